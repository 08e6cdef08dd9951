"""What is learned: tasks as data, rows from files or the hub, and the paper's skewed halves.

Nothing here imports torch; ``datasets`` and ``pyarrow`` only inside the functions that need them.
"""

from __future__ import annotations
