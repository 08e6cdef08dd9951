"""Errors a user can cause, and the exit code each family maps to.

A message says where (file, module or flag), what was found, what was expected and what to do;
``PEMError.build`` assembles the four parts so that no message forgets one.
"""

from __future__ import annotations

import difflib
import importlib.util
import shlex
import sys
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_RUN_FAILED = 3
EXIT_PREEMPTED = 75

# What optional packages are asked for as, here and in the extras of setup.py.
REQUIREMENTS = {
    "matplotlib": ("matplotlib>=3.9",),
    "gguf": ("gguf>=0.17",),
    "onnx": ("onnx>=1.17",),
    "detoxify": ("detoxify>=0.5",),
    "optuna": ("optuna>=4.4", "cmaes>=0.11"),
    "openai": ("openai>=2.0",),
    "bitsandbytes": ("bitsandbytes>=0.48",),
    "lm_eval": ("lm-eval>=0.4.13",),
}

MAX_PLACE, MAX_FACT = 1000, 400  # characters of a message's parts; names in files can be megabytes


class PEMError(ValueError):
    """Bad input: a file, flag or module that cannot be used as asked. Programs exit with 2."""

    exit_code = EXIT_BAD_INPUT

    @classmethod
    def build(
        cls,
        where: object,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        do: str = "",
    ) -> PEMError:
        """Assemble ``where: what; found X, expected Y; remedy`` into one printable line."""
        what = _line(what, MAX_FACT)
        parts = [f"{_line(where, MAX_PLACE)}: {what}" if where else what]
        facts = []
        if found is not None:
            facts.append(f"found {_line(found, MAX_FACT)}")
        if expected is not None:
            facts.append(f"expected {_line(expected, MAX_FACT)}")
        if facts:
            parts.append(", ".join(facts))
        if do:
            parts.append(_line(do, MAX_FACT))
        return cls("; ".join(parts))


def wrong_type(where: str, value: object, expected: str, *, do: str = "") -> PEMError:
    """The error of an argument whose type cannot be used.

    Examples:
        >>> str(wrong_type("coefficients", 5, "a list of numbers"))
        'coefficients: wrong type; found 5 (int), expected a list of numbers'
    """
    found = f"{_line(repr(value), MAX_FACT // 2)} ({type(value).__name__})"
    return PEMError.build(where, "wrong type", found=found, expected=expected, do=do)


def _line(value: object, limit: int) -> str:
    """One line of at most about ``limit`` characters, in which a terminal finds no commands."""
    text = " ".join(str(value).split())
    if len(text) > limit:
        text = f"{text[: 2 * limit // 3]} ... {text[-limit // 3 :]}"
    return printable(text)


def printable(text: str) -> str:
    r"""The text with ``\x1b`` and the like in the place of what a terminal would obey.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(PEMError):
    """A command line that cannot be run as written."""


class CheckpointError(PEMError):
    """A file or directory that is not the module it should be."""


class UnsupportedModule(CheckpointError):
    """A module whose meaning cannot be represented exactly; it is refused by name."""


class IncompatibleModules(PEMError):
    """Modules that differ where the operation needs them equal."""


class UnknownRole(PEMError):
    """A tensor name whose last component is not a role."""


class DataError(PEMError):
    """A data file, row or label that cannot be used."""


class RunFailed(PEMError):
    """The run itself failed (divergence, no space). Programs exit with 3."""

    exit_code = EXIT_RUN_FAILED


class MissingPackage(RunFailed):
    """An optional package is not installed; what needs no such package has been done."""


class Preempted(KeyboardInterrupt):
    """The run was asked to stop, saved, and can be resumed. Programs exit with 75.

    No error: a part that goes on after errors must not go on after this.
    """

    exit_code = EXIT_PREEMPTED

    @classmethod
    def build(cls, where: object, what: str, *, do: str = "") -> Preempted:
        """Assemble the parts as ``PEMError.build`` does."""
        return cls(str(PEMError.build(where, what, do=do)))


def installed(package: str) -> bool:
    """True for a package that can be imported; a folder of that name (of logs, say) is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def install(package: str) -> str:
    """The command that installs an optional package for the Python that runs, whether this package
    came as a clone or as a wheel."""
    wanted = map(shlex.quote, REQUIREMENTS.get(package, (package,)))
    return f"{shlex.quote(sys.executable or 'python')} -m pip install {' '.join(wanted)}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that another one may be a slip of the pen for; None where none is near."""
    return next(iter(near(word, known)), None)


def near(word: str, known: Iterable[str], share: float = 0.75, most: int = 1) -> list[str]:
    """The known words that another one may be a slip of the pen for, the nearest first.

    Near: three quarters (``share``) of the letters of both are the same, in the same order.
    """
    return difflib.get_close_matches(word, list(known), n=most, cutoff=share)


def close_match(word: str, known: Iterable[str]) -> str:
    """``did you mean X?``, or an empty string when nothing is near."""
    found = nearest(word, known)
    return "" if found is None else f"did you mean {found}?"


def listing(names: Iterable[str], most: int = 12) -> str:
    """Names as one readable string, shortened.

    >>> listing("abcd", 2)
    'a, b and 2 more'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
