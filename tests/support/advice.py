"""What a message advises must be possible: a flag that it names is one of the program."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

from pem_composition import cli
from pem_composition.cli import parser
from pem_composition.errors import PEMError

WORD = re.compile(r"(?<![\w./-])(?:(pem )?([a-z]+)(\.py)?(?![\w/.-])|(--[a-zA-Z][\w-]*))")
OTHERS = frozenset({"vllm", "pip", "torchrun", "accelerate"})  # programs that are not ours
REFUSED = {"detoxify": {"--space"}}  # flags that a program takes to say what is meant


@functools.cache
def flags_of(program: str) -> frozenset[str]:
    """The flags that a program takes, by all their names."""
    module = cli.load(program)
    known = parser.build_parser(module.Config, program, module.HELP)._option_string_actions
    return frozenset(known) - REFUSED.get(program, set())


def impossible(program: str, message: str) -> Iterator[str]:
    """The advised flags that their program does not take: that which the clause names, as in ``pem
    fold --space delta``, else the one that prints the message, or one whose name is a word of it.

    What is called an unknown flag or was found, such as words of a server, is no advice.
    """
    advice = message.rpartition(": unknown flag")[2]
    advice = re.sub(r"; found .*?(?=, expected |; |$)", "", advice)
    if program in REFUSED:  # which says at first that such a flag was given
        advice = re.sub(r"^--\S+: ", "", advice)
    for clause in re.split(r"[;(]", advice):
        programs = {program}
        for pem, name, script, flag in WORD.findall(clause):
            if name in cli.SUBCOMMANDS:
                programs = {name} if pem or script else {*programs, name}
            elif name in OTHERS:
                programs = set()
            elif flag and programs and not any(flag in flags_of(p) for p in programs):
                yield f"{' or '.join(sorted(programs))} {flag}"


def checked(guarded: Callable[..., int]) -> Callable[..., int]:
    """``parser.guarded`` that fails where a refusal advises what cannot be done."""

    def run(body: Callable[[], int], prog: str, *, debug: bool = False) -> int:
        def told() -> int:
            try:
                return body()
            except PEMError as error:
                found = list(impossible(prog.removesuffix(".py").split()[-1], str(error)))
                assert not found, f"{prog} advises {found}: {error}"
                raise

        return guarded(told, prog, debug=debug)

    return run
