"""Negate a module: LoRA {A, -s B}, (IA)^3 1 - s (l - 1), full -s delta.

    python negation.py -a DIR -p OUT --strength 0.6

All flags: python negation.py --help. The same program is `pem negation`.
"""

from __future__ import annotations

import sys

from pem_composition.cli import entry

if __name__ == "__main__":
    sys.exit(entry("negation"))
