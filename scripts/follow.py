"""What a reader of one program has to follow: own files and functions it enters, files it opens.

python scripts/follow.py -v merge -a DIR DIR -p OUT    # the words after -v are those after `pem`

The last line is JSON: files and functions that were called, switches from one file to another,
how often each file in a folder named on the command line was opened, and calls of the functions
that compare modules and search tensors for NaN. With -v also the functions, by file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
PACKAGE = f"{ROOT / 'pem_composition'}{os.sep}"
COUNTED = ("check_compatible", "all_finite")
FUNCTION = 1  # flag of a code object that is no body of a class or a module


def follow(words: list[str], *, verbose: bool) -> dict[str, object]:
    """Run ``pem`` with these words, in this process, and count."""
    calls: Counter[tuple[str, str]] = Counter()
    opened: Counter[str] = Counter()
    switches, last = 0, ""
    named = [word.rpartition("=")[2] for word in words]  # --module NAME=DIR
    folders = [str(Path(word).absolute()) for word in named if Path(word).is_dir()]

    def called(frame: FrameType, event: str, _: object) -> None:
        nonlocal switches, last
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_flags & FUNCTION:
            file = code.co_filename.removeprefix(PACKAGE)
            switches, last = switches + (file != last), file
            if not code.co_name.startswith("<"):  # a lambda or a comprehension is part of another
                calls[file, code.co_qualname] += 1

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | Path):
            path = str(Path(arguments[0]).absolute())
            if any(path.startswith(f"{folder}{os.sep}") for folder in folders):
                opened[path] += 1

    import torch  # noqa: F401  # a hundred thousand calls that are none of ours

    from pem_composition import cli  # its own import is no part of the way

    sys.addaudithook(audit)
    threading.setprofile(called)
    sys.setprofile(called)
    try:
        code = cli.main(words)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if verbose:
        for file in sorted({file for file, _ in calls}):
            print(file, *sorted(name for f, name in calls if f == file))
    return {
        "exit": code,
        "files": len({file for file, _ in calls}),
        "functions": len(calls),
        "switches": switches,
        "opened": dict(opened),
        "calls": {name: sum(n for (_, q), n in calls.items() if q == name) for name in COUNTED},
    }


def main(words: list[str]) -> int:
    """Follow ``pem`` with these words, behind a ``-v`` or not, and print what was counted."""
    verbose = words[:1] == ["-v"]
    print(json.dumps(follow(words[verbose:], verbose=verbose)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may see enough
    sys.exit(main(sys.argv[1:]))
