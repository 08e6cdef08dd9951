"""Command line flags from a dataclass, and errors as one line. No torch, no files.

A subcommand module holds ``NAME``, ``HELP``, ``Config`` (a dataclass), ``run(config) -> int``, and
may hold ``EXAMPLES`` and ``expand(argv) -> argv``, of words that stand for others. A field without
a default is required; its annotation gives the type (``str``, ``int``, ``float``, ``bool``,
``Path``, ``Literal[...]``, an optional of one of these, ``tuple[T, ...]``, ``tuple[T, T]``,
``list[T]``); its metadata may hold

    help        one line
    short       "-a"
    flag        name of the flag where it cannot be the field's, such as "as"
    aliases     further names of the flag
    least, above, most, below   range of a number
    choices     the allowed values
    nargs       as in argparse, "+" for sequences if absent
    metavar     name of the value in the help text
    positional  True: an argument without a flag
    repeat      True: the flag may be given several times and collects

``NEEDS`` of the dataclass, if it has one, names flags that have no effect without another one, by
that other one. ``--help`` shows the flags under the titles of ``cli/groups.py``.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import errno
import functools
import gc
import os
import re
import select
import shlex
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

from pem_composition import launch, signals
from pem_composition.cli import former, groups, paths
from pem_composition.cli.values import CONVERTERS, FALSE_WORDS, NEGATIVE_NUMBER, TRUE_WORDS, shield
from pem_composition.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_RUN_FAILED,
    PEMError,
    Preempted,
    UsageError,
    install,
    installed,
    nearest,
)
from pem_composition.flag_declarations import check_ranges

T = TypeVar("T")

COMMAND: ContextVar[str] = ContextVar("COMMAND", default="")  # the words that are being run
# Programs whose processes share the work of a launch, as those with --evaluate do.
SHARED = ("train", "sweep", "search", "evaluate", "fisher", "gram", "learn")
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
FULL_DISK = NO_SPACE | {errno.EIO, errno.EFBIG}
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # as of other programs that write into a closed pipe


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of printing usage and exiting."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._negative_number_matcher = NEGATIVE_NUMBER

    def error(self, message: str) -> NoReturn:
        """Give the reason to the caller, who prints it as one line."""
        message = message.replace("the following arguments are required:", "missing")
        message = re.sub(r"^argument (\S+): ", lambda m: m[1].split("/")[-1] + ": ", message)
        raise UsageError(message.replace("unrecognized arguments:", "unexpected argument"))


_hints = functools.cache(typing.get_type_hints)  # compiles every annotation


@functools.cache
def build_parser(config_class: type, prog: str, description: str, examples: str = "") -> Parser:
    """One argument per field of the dataclass, in groups: those that must be given come first.

    Arguments without a flag keep the order of their declaration, which is their meaning.
    """
    epilog = f"examples:\n{examples.strip(chr(10))}" if examples else None
    parser = Parser(prog, description, epilog)
    hints = _hints(config_class)
    specs = [spec for spec in dataclasses.fields(config_class) if spec.init]
    titles = {
        s.name: groups.OWN if _required(s) else groups.TITLES.get(s.name, groups.OWN) for s in specs
    }
    shown = {t: parser.add_argument_group(t) for t in _TITLES if t in titles.values()}

    def place(spec: dataclasses.Field[Any]) -> tuple[bool, int]:
        positional = spec.metadata.get("positional")
        return not _required(spec), -1 if positional else groups.PLACES.get(spec.name, -1)

    for spec in sorted(specs, key=place):
        _add_field(shown[titles[spec.name]], spec, hints[spec.name])
    parser.add_argument("--debug", action="store_true", help="on an error, print the traceback")
    needed = [action for action in parser._actions if action.required]
    words = [" ".join([*a.option_strings[-1:], str(a.metavar or a.dest)]) for a in needed]
    parser.usage = " ".join([prog, *words, "[flags]"]).replace("%", "%%")
    parser._action_groups.append(parser._action_groups.pop(1))  # --help and --debug stand last
    return parser


_TITLES = (groups.OWN, *groups.GROUPS)


def parse(
    config_class: type[T], argv: Sequence[str], prog: str, description: str = "", examples: str = ""
) -> T:
    """Read ``argv`` into the dataclass.

    Raises:
        UsageError: an unknown, repeated or missing flag, or a value of the wrong kind.
    """
    parser = build_parser(config_class, prog, description, examples)
    words, given = _normalise(parser, argv)
    namespace = vars(parser.parse_args(words))
    hints = _hints(config_class)
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if spec.init:
            value = namespace[spec.name]  # argparse collects lists, also for tuples
            tupled = isinstance(value, list) and "tuple[" in str(hints[spec.name])
            values[spec.name] = tuple(value) if tupled else value
    check_ranges(config_class, values)
    _check_needs(config_class, given, values)
    return config_class(**values)


def _check_needs(config_class: type, given: set[str], values: dict[str, Any]) -> None:
    """Refuse a flag that was given without the one that it needs to have an effect.

    Raises:
        UsageError: naming both.
    """
    needs: dict[str, Sequence[str]] = getattr(config_class, "NEEDS", {})
    arguments = {s.name for s in dataclasses.fields(config_class) if s.metadata.get("positional")}
    for needed, names in needs.items():
        flag, _, word = needed.partition("=")  # FLAG, or FLAG=WORD, or ARGUMENT=WORD
        met = values[flag] == word if word else values[flag]
        shown = word if flag in arguments else f"--{flag} {word}".rstrip()
        for name in names:
            if name in given and not met:
                raise UsageError.build(
                    f"--{name}", f"has no effect without {shown}",
                    do=f"add {shown} or leave it out",
                )  # fmt: skip


def run(module: Any, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse, run, and turn every error into one line on stderr and an exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    prog = prog or f"pem {module.NAME}"
    examples = getattr(module, "EXAMPLES", "")

    def body() -> int:
        words = getattr(module, "expand", list)(argv)
        COMMAND.set(shlex.join([*prog.split(), *words]))
        config = parse(module.Config, words, prog, module.HELP, examples)
        for output in paths.check(config, module.NAME):
            signals.current().finish_after(output)
        if launch.is_main():
            return int(module.run(config) or EXIT_DONE)
        if not (module.NAME in SHARED or getattr(config, "evaluate", False)):
            return EXIT_DONE  # the first process of the launch does it
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            return int(module.run(config) or EXIT_DONE)

    return guarded(body, prog, debug="--debug" in argv)


def guarded(body: Callable[[], int], prog: str, *, debug: bool = False) -> int:
    """Run ``body``; report what it raises as ``prog: error: ...`` and return the exit code."""
    try:
        with signals.StopRequest():
            with suppress(AttributeError):  # a path may hold bytes that are no text
                sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
            # The process ends after this: looking for cycles in torch's modules takes .2 s.
            atexit.register(gc.freeze)
            code = body()
            sys.stdout.flush()
            return code
    except SystemExit as stop:  # argparse's --help
        return stop.code if isinstance(stop.code, int) else EXIT_DONE
    except (Exception, KeyboardInterrupt) as error:
        if _has_no_reader(error):
            return EXIT_NO_READER
        code, message = _describe(error)
        if debug:
            traceback.print_exc()
        sys.stdout.flush()
        print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
        return code


def _has_no_reader(error: BaseException) -> bool:
    """True where a reader such as ``head`` has seen enough; nothing is written to it any more."""
    if not isinstance(error, BrokenPipeError):
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    closed = any(events & select.POLLERR for _, events in output.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _describe(error: BaseException) -> tuple[int, str]:
    """Exit code and one-line message of an exception."""
    if isinstance(error, PEMError | Preempted):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, MemoryError):
        return EXIT_RUN_FAILED, "not enough memory"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        code = EXIT_RUN_FAILED if error.errno in FULL_DISK else EXIT_BAD_INPUT
        do = "; free some space, or write elsewhere" if error.errno in NO_SPACE else ""
        return code, f"{where}{error.strerror or error}{do}"
    package = error.name.partition(".")[0] if isinstance(error, ImportError) and error.name else ""
    if package and not installed(package):
        clone = Path(__file__).parents[2]  # its setup.py says all that is needed
        wanted = str(clone) if (clone / "setup.py").is_file() else package
        return EXIT_RUN_FAILED, (
            f"{package}: not installed for this Python; found {sys.executable}; "
            f"use the environment that has it, or run {install(wanted)}"
        )
    hint = "; run it again with --debug for the traceback"
    return EXIT_RUN_FAILED, f"unexpected {type(error).__name__}: {error}{hint}"


def _add_field(parser: argparse._ArgumentGroup, spec: dataclasses.Field[Any], hint: Any) -> None:
    """Add the argument for one dataclass field."""
    meta = spec.metadata
    element, nargs = _element(hint)
    keywords: dict[str, Any] = {"help": _help_text(spec), "default": _default(spec)}
    choices = meta.get("choices")
    if typing.get_origin(element) is Literal:
        choices, element = typing.get_args(element), str
    keywords["type"] = CONVERTERS[element]
    if choices is not None:
        keywords["choices"] = list(choices)
    if element is bool:
        parser.add_argument(
            *_names(spec), dest=spec.name, nargs="?", const=True, metavar="true|false", **keywords
        )
        parser.add_argument(
            f"--no-{spec.name}",
            f"--no_{spec.name}",
            dest=spec.name,
            action="store_false",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
        return
    if meta.get("repeat"):
        keywords |= {"action": "append", "default": list(keywords["default"])}
    elif nargs or meta.get("nargs"):
        keywords["nargs"] = meta.get("nargs", nargs)
    if choices is None:
        keywords["metavar"] = meta.get("metavar", spec.name.upper())
    if meta.get("positional"):
        if not _required(spec):
            keywords.setdefault("nargs", "?")
        parser.add_argument(spec.name, **keywords)
    else:
        parser.add_argument(*_names(spec), dest=spec.name, required=_required(spec), **keywords)


def _names(spec: dataclasses.Field[Any]) -> list[str]:
    short, meta = spec.metadata.get("short"), spec.metadata
    names = [meta.get("flag", spec.name), *meta.get("aliases", ())]
    return [*([short] if short else []), *(f"--{name}" for name in names)]


def _required(spec: dataclasses.Field[Any]) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    return None if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def _help_text(spec: dataclasses.Field[Any]) -> str:
    """The field's help with its default; a percent sign is argparse's formatting character."""
    text, default = str(spec.metadata.get("help", "")), _default(spec)
    if default is not None and default not in ((), []) and "default" not in text:
        text += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
    return text.replace("%", "%%")


def _element(hint: Any) -> tuple[Any, str | int | None]:
    """Type of one value and the number of values: ``tuple[float, ...]`` -> (float, "+")."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        hint = Union[tuple(a for a in typing.get_args(hint) if a is not type(None))]  # noqa: UP007
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return arguments[0], "+" if arguments[-1] is Ellipsis else len(arguments)
    if origin in (list, Sequence):
        return arguments[0], "+"
    return hint, None


def _normalise(parser: Parser, argv: Sequence[str]) -> tuple[list[str], set[str]]:
    """Check every flag by name before argparse sees it; spell hyphens inside names as underscores.

    Returns:
        The words for argparse, and the names of the fields that were given.

    Raises:
        UsageError: unknown flag (with the nearest known one), or a list-valued flag given twice.
    """
    actions = parser._option_string_actions
    positional = any(not a.option_strings for a in parser._actions)
    seen: set[str] = set()
    out: list[str] = []
    for index, token in enumerate(argv):
        if token == "--":
            return [*out, *argv[index:]], seen
        if not token.startswith("-") or token == "-" or NEGATIVE_NUMBER.match(token):
            out.append(token)
            continue
        name, equals, value = token.partition("=")
        # --save-path is --save_path; --no-x and --no_x are both known as they are.
        underscored = "--" + name[2:].replace("-", "_")
        if name.startswith("--") and name not in actions and underscored in actions:
            name = underscored
        if name not in actions:
            if (positional and not token.startswith("--")) or re.match(r"-[\d.]", token):
                out.append(shield(token))  # an expression such as "-a+b", or a mistyped number
                continue
            raise UsageError.build(name, "unknown flag", do=_flag_remedy(parser, name, actions))
        action = actions[name]
        if action.dest in seen and action.nargs not in (None, 0, "?"):
            raise UsageError.build(name, "given twice", do="list all its values after one flag")
        seen.add(action.dest)
        # An optional value would swallow the positional argument that follows the flag.
        follower = argv[index + 1].lower() if index + 1 < len(argv) else ""
        bare = positional and action.nargs == "?" and action.option_strings and not equals
        out.append(
            f"{name}=true"
            if bare and follower not in TRUE_WORDS | FALSE_WORDS
            else name + equals + value
        )
    return out, seen


def _flag_remedy(parser: Parser, name: str, actions: dict[str, argparse.Action]) -> str:
    """The flag that was meant: by a former name, initials (lr), a slip of the pen, or its words."""
    known = [n.removeprefix("--") for n in actions if n.startswith("--")]
    wanted = name.lstrip("-").replace("-", "_")
    if renamed := former.answer(wanted, known):
        return renamed
    words = set(wanted.split("_"))
    by_initials = (n for n in known if "".join(w[0] for w in n.split("_") if w[1:]) == wanted)
    by_words = (n for n in known if words <= set(n.split("_")))
    near = next(by_initials, None) or nearest(wanted, known) or next(by_words, None)
    return f"did you mean --{near}?" if near else f"see {parser.prog} --help"
