"""Merge modules: sum_i c_i m_i.

    python merge.py -a DIR DIR ... -p OUT --coefficients 0.3 0.7

Without --coefficients every module counts 1/n; --search_step entries are divided by their sum.
--grid 0 0.05 1 makes the points (t, 1 - t) for two modules, all multiples of 0.05 that sum to 1
for more, and with --evaluate scores them on one task or several.
All flags: python merge.py --help. The same program is `pem merge`.
"""

from __future__ import annotations

import sys

from pem_composition.cli import entry

if __name__ == "__main__":
    sys.exit(entry("merge"))
