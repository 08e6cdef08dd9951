"""Seconds until help, a refusal or a check of modules is on the screen: at most 0.5 are allowed.

python scripts/benchmarks/first_answer.py [--runs 5]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile

from merge_process import REPOSITORY, saved_pair
from timing import report, side_by_side

from pem_composition import cli

NOTHING = "python -c pass"
REFUSED = {
    "merge.py, no such directory": ["merge.py", "-a", "no/such", "nowhere", "-p", "out"],
    "negation.py, nan": ["negation.py", "-a", "x", "-p", "out", "--strength", "nan"],
    "pem compose, a product": ["-m", "pem_composition", "compose", "a*b", "-p", "out"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        dirs = saved_pair(folder)
        commands = {NOTHING: ["-c", "pass"]}
        for name in ("merge", "negation", "analogy"):
            commands[f"{name}.py --help"] = [f"{name}.py", "--help"]
        for name in cli.SUBCOMMANDS:
            commands[f"pem {name} --help"] = ["-m", "pem_composition", name, "--help"]
        commands |= REFUSED | {"pem check A B": ["-m", "pem_composition", "check", *dirs]}
        commands["pem inspect A"] = ["-m", "pem_composition", "inspect", dirs[0]]
        calls = {
            name: lambda words=words: subprocess.run(
                [sys.executable, *words], cwd=REPOSITORY, capture_output=True, check=False
            )
            for name, words in commands.items()
        }
        report(side_by_side(calls, runs), base=NOTHING)


if __name__ == "__main__":
    main()
