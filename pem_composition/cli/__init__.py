"""The ``pem`` program: one file per subcommand, each imported only when it is named."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import PurePath
from types import ModuleType

from pem_composition import signals, threads
from pem_composition._version import __version__
from pem_composition.errors import EXIT_DONE, UsageError, close_match

# In the order of the work: data, modules, arithmetic, evaluation, reports.
SUBCOMMANDS = (
    "offline", "select", "pairs", "split", "init", "train", "merge", "negation", "analogy",
    "detoxify", "compose", "fold", "extract", "methods", "inspect", "check", "compare", "rebuild",
    "convert", "push", "evaluate", "perplexity", "generate", "answer", "judge", "helpfulness",
    "fisher", "gram", "refit", "sweep", "search", "learn", "report", "exps",
)  # fmt: skip

USAGE = "usage: pem SUBCOMMAND [flags]      (pem help SUBCOMMAND lists the flags; pem --version)"


def load(name: str) -> ModuleType:
    """The module of a subcommand.

    Raises:
        UsageError: no such subcommand; the nearest name is suggested.
    """
    if name not in SUBCOMMANDS:
        remedy = close_match(name, SUBCOMMANDS) or f"one of {', '.join(SUBCOMMANDS)}"
        raise UsageError.build(name, "unknown subcommand", do=remedy)
    return importlib.import_module(f"pem_composition.cli.{name}")


def overview() -> str:
    """Text of ``pem --help``: every subcommand with its one-line help."""
    lines = [USAGE, "", "Compose parameter-efficient modules by arithmetic.", "", "subcommands:"]
    lines += [f"  {name:<11} {load(name).HELP}" for name in SUBCOMMANDS]
    return "\n".join(lines)


def entry(program: str | None = None) -> int:
    """A whole process: ``pem``, one program at the repository root, or a script ``pem-PROGRAM``.

    The installed scripts ``pem-merge``, ``pem-negation``, ``pem-analogy`` are told by their name.
    """
    # None: closed by the caller, as by >&-
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    script, prog = PurePath(sys.argv[0]).stem, f"{program}.py" if program else "pem"
    if program is None and script.startswith("pem-"):
        prog, program = script, script.removeprefix("pem-")
    signals.catch(prog)
    threads.share_processors(os.environ)
    code = main([program, *sys.argv[1:]], prog) if program else main()
    signals.ignore()
    return code


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run ``pem`` with the given arguments and return its exit code.

    Args:
        prog: name of the program in messages.
    """
    from pem_composition.cli import parser

    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--version"]:
        print(f"pem-composition {__version__}")
        return EXIT_DONE
    if argv[:1] == ["help"] and len(argv) == 2:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return EXIT_DONE
    module: list[ModuleType] = []

    def find() -> int:
        module.append(load(argv[0]))
        return EXIT_DONE

    code = parser.guarded(find, "pem", debug="--debug" in argv)
    return code if code else parser.run(module[0], argv[1:], prog=prog or f"pem {argv[0]}")
