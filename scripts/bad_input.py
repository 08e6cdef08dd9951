"""Write docs/bad_input.md from the cases in tests/faults/.

python scripts/bad_input.py            # the page
python scripts/bad_input.py --peers    # first run PEFT on the same input again (a few minutes)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import measure, table  # noqa: E402


def main() -> None:
    """Write the page, after measuring if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="run PEFT on the same input again")
    if parser.parse_args().peers:
        measure.write()
    table.PATH.write_text(table.page(), encoding="utf-8")
    print(table.PATH)


if __name__ == "__main__":
    main()
