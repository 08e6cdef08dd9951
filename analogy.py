"""Module analogy: lam * CLS + (1 - lam) * (TARGET_LM - SOURCE_LM).

    python analogy.py -a CLS TARGET_LM SOURCE_LM -p OUT --coefficient 0.9

--grid 0 0.1 1 0.8 0.02 1 makes one module for each value of lam; with --evaluate it scores them.
All flags: python analogy.py --help. The same program is `pem analogy`.
"""

from __future__ import annotations

import sys

from pem_composition.cli import entry

if __name__ == "__main__":
    sys.exit(entry("analogy"))
