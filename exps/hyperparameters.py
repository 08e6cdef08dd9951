"""Refuses a hyperparameter that an experiment script does not have, before anything is run.

Hyperparameters are environment variables, so a misspelt one would change nothing and say nothing.
``common.sh`` calls this once, in the script that was started. A script takes the values of its
block (``: "${max_steps:=1500}"``); one that calls others with ``child`` takes theirs, too, without
those that it gives them itself (``child ... seed="$seed"``).

    python -m exps.hyperparameters SCRIPT [FOLDER [ARGUMENT...]]

FOLDER is where the called scripts are, if SCRIPT puts its name together; such a script takes
arguments of its own.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pem_composition.errors import PEMError, UsageError, nearest

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = re.compile(r"^\s*: .*", re.MULTILINE)  # : "${max_steps:=1500}"
OLDER = re.compile(r"^\w+=\$\{.*", re.MULTILINE)  # max_steps=${toxic_max_steps:-${max_steps:-}}
VALUE = re.compile(r"\$\{([A-Za-z]\w*):?[-=?]")
SOURCE = re.compile(r"^source .*", re.MULTILINE)
CHILD = re.compile(r"""^\s*child "?([^"\s]+)"?((?:[^\n\\]|\\\n)*)""", re.MULTILINE)
GIVEN = re.compile(r"""[\s"](\w+)=""")
FOLDER = re.compile(r"exps/composition_\w+")
VARIABLE = re.compile(r"\$\{?\w+\}?")
SHORT = 5  # letters that are no hint: `name` is a variable of other programs


def known_to(script: str, folder: str = "") -> set[str]:
    """The hyperparameters that a script takes; ``folder`` as for ``main``."""
    found = FOLDER.search(script)
    folder = folder or (found[0] if found else "exps")
    return _known(script, ROOT / folder, {script})


def _known(script: str, folder: Path, seen: set[str]) -> set[str]:
    block = SOURCE.split(script)[0]
    own = _declared(block, DEFAULT, OLDER) | _declared(_text(ROOT / "exps/common.sh"))
    shared, given = _sourced(folder), set[str]()
    for place, arguments in CHILD.findall(script):
        given |= set(GIVEN.findall(arguments))
        for called in map(_text, folder.glob(VARIABLE.sub("*", place.rpartition("/")[2]))):
            if called not in seen:
                shared |= _known(called, folder, seen | {called})
    return own | (shared - given)


def _sourced(folder: Path) -> set[str]:
    text = _text(folder / "common.sh")
    both = "text_to_text.sh" in text
    return _declared(text) | (_declared(_text(ROOT / "exps/text_to_text.sh")) if both else set())


def _declared(text: str, *forms: re.Pattern[str]) -> set[str]:
    lines = [line for form in forms or (DEFAULT,) for line in form.findall(text)]
    return {name for line in lines for name in VALUE.findall(line)}


def _text(script: Path) -> str:
    return script.read_text(encoding="utf-8")


def wrong(known: set[str], variables: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Variables that are meant for the scripts and that this one does not take; the one meant.

    Meant is what another script takes, and what is near a value of this one.
    """
    anywhere = {
        n for f in (ROOT / "exps").rglob("*.sh") for n in _declared(_text(f), DEFAULT, OLDER)
    }
    plain = {name.casefold(): name for name in known}
    for name in variables:
        if name in known:
            continue
        near = nearest(name.casefold(), plain) or _longer(name, plain)
        if near is not None or name in anywhere:
            yield name, plain[near] if near is not None else ""


def _longer(name: str, known: dict[str, str]) -> str | None:
    """The value whose name has these words among others (``epochs``) or these initials (``lr``)."""
    for other in sorted(known):
        words = other.split("_")
        initials = "".join(word[0] for word in words)
        part = len(name) >= SHORT and f"_{name}_" in f"_{other}_"
        if len(words) > 1 and (part or name == initials):
            return other
    return None


def main(script: str, folder: str = "", *arguments: str) -> int:
    """Exit code: 0, or 2 with one line on stderr."""
    program = Path(script).name
    try:
        if arguments and not folder:
            raise UsageError.build(
                program, "takes no arguments", found=arguments[0],
                expected="values before it", do=f"write: max_steps=100 bash .../{program}",
            )  # fmt: skip
        known = known_to(_text(Path(script)), folder)
        for name, meant in wrong(known, sorted(os.environ)):
            raise UsageError.build(
                program, f"has no hyperparameter {name}", found=f"{name}={os.environ[name]}",
                do=f"did you mean {meant}?" if meant else f"it has {', '.join(sorted(known))}",
            )  # fmt: skip
    except PEMError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
