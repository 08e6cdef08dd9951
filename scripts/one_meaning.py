"""Every cell of the differential test of one module on every way, against live PEFT, counted.

python scripts/one_meaning.py                # about four minutes on one core
python scripts/one_meaning.py gpt2 "t5 untied"
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import transformers  # noqa: E402
from support import one_meaning  # noqa: E402


def models() -> list[str]:
    """The models named on the command line; every model if there is none."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("model", nargs="*", help=f"of: {', '.join(one_meaning.BY_NAME)}")
    named: list[str] = parser.parse_args().model
    unknown = [name for name in named if name not in one_meaning.BY_NAME]
    if unknown:
        parser.error(f"no such model: {unknown}; there are {list(one_meaning.BY_NAME)}")
    return named or list(one_meaning.BY_NAME)


def main() -> None:
    """Print the number of verdicts, what is wrong, and how often each reason refuses."""
    names = models()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        found = list(one_meaning.verdicts(Path(folder), names))
    print(", ".join(f"{n} {word}" for word, n in Counter(v.word for v in found).most_common()))
    for v in found:
        if v.word not in ("right", "refused"):
            print(f"{v.word}: {v.model}, {v.request}, {v.way}: {v.said}")
    reasons = Counter(re.sub(r"'[^']*'|/\S+", "...", v.said)[:150] for v in found if v.said)
    for reason, n in reasons.most_common():
        print(f"{n:5} {reason}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may see enough
    main()
