"""Damage modules, models and expressions at random and check what comes of it.

    python scripts/fuzz.py --examples 10000 --seed 0
    python scripts/fuzz.py --examples 1 --seed 1234 --target pickle      # one example again

Every example has a seed of its own, SEED + its number, which is printed when a law fails. The laws
are those of tests/faults/laws.py, which the tests try on fewer examples.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import laws  # noqa: E402


def main() -> int:
    """Run the examples; exit 1 if a law failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000, help="per target")
    parser.add_argument("--seed", type=int, default=0, help="of the first example")
    parser.add_argument("--target", choices=[t.name for t in laws.TARGETS], help="default: all")
    flags = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        root = laws.prepare(Path(folder))
        os.chdir(root)
        print(f"{'target':<20} {'examples':>8}  outcomes; slowest example, processor seconds")
        for target in laws.TARGETS:
            if flags.target in (None, target.name):
                failures += run(target, root, range(flags.seed, flags.seed + flags.examples))
        os.chdir(ROOT)
    return int(failures > 0)


def run(target: laws.Target, root: Path, seeds: range) -> int:
    """All examples of one target; prints a line and returns the number of failures."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for seed in seeds:
        start = time.process_time()
        try:
            outcome = laws.check(target, root, Random(seed))
        except Exception:
            outcome = "FAILED"
            print(f"--- {target.name}: --examples 1 --seed {seed} --target '{target.name}'")
            traceback.print_exc(limit=-4, file=sys.stdout)
        outcomes[outcome] += 1
        slowest = max(slowest, time.process_time() - start)
    counts = ", ".join(f"{n} {what}" for what, n in outcomes.most_common())
    print(f"{target.name:<20} {len(seeds):>8}  {counts}; {slowest:.2f}", flush=True)
    return outcomes["FAILED"]


if __name__ == "__main__":
    sys.exit(main())
