"""``python -m pem_composition`` is ``pem``."""

from __future__ import annotations

import sys

from pem_composition.cli import entry

if __name__ == "__main__":
    sys.exit(entry())
