"""``pem compose``: any expression over modules, as one n-ary combination."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pem_composition.arithmetic import expression as grammar
from pem_composition.cli import common
from pem_composition.cli import flags as shared
from pem_composition.errors import UsageError

if TYPE_CHECKING:
    from pem_composition.module import PEM

NAME = "compose"
HELP = 'evaluate an expression over modules: "0.6*a + 0.4*(b - c)", negate(a, 0.5), mean(a, b)'
EXAMPLES = """
  pem compose "0.6*a + 0.4*(b - c)" --module a=runs/a --module b=runs/b --module c=runs/c -p out
  pem compose "mean(a, b)" --module a=runs/a --module b=runs/b -p out --space delta --rank 8
"""


@dataclass(frozen=True, kw_only=True)
class Config(shared.OutputFlags):
    """Flags of pem compose."""

    expression: str = field(
        metadata={
            "positional": True,
            "help": "numbers, names, + - * / ( ), negate(x, s), mean(x, ...)",
        }
    )
    module: tuple[str, ...] = field(
        default=(),
        metadata={
            "repeat": True,
            "metavar": "NAME=DIR",
            "help": "what a name stands for; once per name",
        },
    )
    head: str = field(
        default="average", metadata={"choices": shared.HEADS, "help": "which head the result has"}
    )


def run(config: Config) -> int:
    """Evaluate the expression and write the module."""
    tree = grammar.parse(config.expression)
    bound = bindings(config.module)
    used = grammar.names(tree)
    _check_names(used, bound)
    paths = [bound[name] for name in used]
    common.check_output(config.save_path, paths, config.overwrite)
    common.read_headers(paths, list(used), config)

    modules = dict(zip(used, common.load_modules(paths, used), strict=True))
    result = _evaluate(tree, modules, config)
    result.save(
        config.save_path, format=config.format, dtype=config.dtype, overwrite=config.overwrite
    )
    common.report(config.save_path, result)
    return 0


def bindings(pairs: tuple[str, ...]) -> dict[str, str]:
    """name -> directory from NAME=DIR.

    Raises:
        UsageError: no '=', a name that the grammar cannot read, or a name given twice.
    """
    bound: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UsageError.build(
                "--module", "not a binding", found=repr(pair), expected="NAME=DIR, such as a=runs/a"
            )
        if name in bound:
            raise UsageError.build(
                "--module", "a name given twice", found=name, do="give each name once"
            )
        if name in grammar.FUNCTIONS:
            raise UsageError.build(
                "--module", "the name of a function", found=name, do="choose another name"
            )
        bound[name] = path
    return bound


def _check_names(used: tuple[str, ...], bound: Mapping[str, str]) -> None:
    for name in used:
        if name not in bound:
            raise UsageError.build(
                "expression",
                f"no module named '{name}'",
                found=f"names {sorted(bound)}",
                do=f"add --module {name}=DIR",
            )
    for name in bound:
        if name not in used:
            raise UsageError.build(
                "--module",
                "a module that the expression does not use",
                found=name,
                do="leave it out",
            )


def _evaluate(tree: grammar.Sum, modules: Mapping[str, PEM], config: Config) -> PEM:
    from pem_composition.module import combine, negate

    def weighted(operands: list[PEM], coefficients: list[float]) -> PEM:
        return combine(
            operands,
            coefficients,
            space=config.one_space,
            rank=config.rank,
            head=config.head,
            dtype=config.dtype,
            allow_base_mismatch=config.allow_base_mismatch,
        )

    return grammar.evaluate(
        tree, modules, weighted, None if config.one_space == "delta" else negate
    )
