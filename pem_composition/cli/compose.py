"""``pem compose``: any expression over modules, from the command line or a file."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pem_composition.arithmetic import trees
from pem_composition.arithmetic.compatible import check_rank
from pem_composition.arithmetic.expression import FUNCTIONS, parse
from pem_composition.arithmetic.methods.registry import resolve
from pem_composition.checkpoint.files import check_apart
from pem_composition.cli import common, recipe
from pem_composition.cli import flags as shared
from pem_composition.composition import compose
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader

NAME = "compose"
HELP = 'evaluate an expression over modules: "0.6*a + 0.4*(b - c)", "0.5*ties(a, b) + c"'
EXAMPLES = """
  pem compose "0.6*a + 0.4*(b - c)" --module a=runs/a --module b=runs/b --module c=runs/c -p out
  pem compose "mean(a, b)" --module a=runs/a --module b=runs/b -p out --space delta --rank 8
  pem compose "ties(a, 0.5*b, density=0.2)" --module a=runs/a --module b=runs/b -p out
  pem compose --config recipe.yaml -p out
"""


@dataclass(frozen=True, kw_only=True)
class Config(shared.OutputFlags):
    """Flags of pem compose."""

    expression: str | None = flag(
        None,
        "numbers, names, + - * / ( ), mean(x, ...), negate(x, s), delta(x), "
        'parameter(x), log(x), layers(x, "pattern", factor), and every merging method with its '
        "settings (pem methods)",
        positional=True,
    )
    module: tuple[str, ...] = shared.named("what a name stands for; once per name")
    config: Path | None = flag(
        None,
        "YAML with expression, modules, space, rank, head, dtype, layers; what it "
        "says is not said again by a flag",
        metavar="FILE",
    )
    head: str | None = flag(
        None, "which head the result has (default: average)", choices=shared.HEADS
    )


def run(config: Config) -> int:
    """Evaluate the expression and write the module."""
    wanted = _recipe(config)
    tree = parse(wanted.expression)
    used = trees.names(tree)
    check_names(used, wanted.modules, wanted.layers)
    paths = [wanted.modules[name] for name in used]
    check_apart(config.save_path, paths, do="choose another --save_path")  # those of --config
    common.check_output(config.save_path, config.overwrite)
    space = wanted.space or trees.default_space(tree)
    lone = tree.lone
    choice = lone.choice if isinstance(lone, trees.Merge) else config.choice()
    check_rank(wanted.rank, space, choice, "lora", "--rank")
    headers = _headers(tree, paths, used, replace(config, rank=wanted.rank, space=(space,)))
    return _write(config, replace(wanted, space=space), tree, headers)


def _write(
    config: Config, wanted: recipe.RecipeFile, tree: trees.Sum, headers: Sequence[ModuleHeader]
) -> int:
    modules = common.load_to_combine(headers, once=False)
    result = compose(
        tree,
        {module.name: module for module in modules},
        space=wanted.space,
        rank=wanted.rank,
        layers=wanted.layers,
        head=wanted.head or "average",
        dtype=wanted.dtype,
        allow_base_mismatch=config.allow_base_mismatch,
    )
    result.save(
        config.save_path, format=config.format, dtype=wanted.dtype, overwrite=config.overwrite
    )
    common.report(config.save_path, result)
    return 0


def _recipe(config: Config) -> recipe.RecipeFile:
    """What the flags and the file ask for together.

    Raises:
        UsageError: no expression, or a value that both give.
    """
    modules = bindings(config.module)
    space = config.space[0] if config.space else None
    if config.config is None:
        if config.expression is None:
            raise UsageError.build(
                "expression", "missing", expected='such as "0.6*a + 0.4*b", or --config FILE'
            )
        return recipe.RecipeFile(
            config.expression, modules, space, config.rank, config.head, config.dtype
        )
    read = recipe.read(config.config)
    given = {
        "expression": config.expression, "space": space, "rank": config.rank,
        "head": config.head, "dtype": config.dtype,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and getattr(read, name) is not None:
            _refuse_twice(name, config.config)
    for name in modules:
        if name in read.modules:
            _refuse_twice(f"module {name}", config.config)
    bindings([f"{name}={path}" for name, path in read.modules.items()], f"{config.config}, modules")
    own = {name: value for name, value in given.items() if value is not None}
    return replace(read, modules={**read.modules, **modules}, **own)


def _refuse_twice(what: str, file: Path) -> None:
    raise UsageError.build(file, f"{what} is given on the command line too", do="give it once")


def _headers(
    tree: trees.Sum, paths: Sequence[str], used: Sequence[str], config: Config
) -> list[ModuleHeader]:
    """Headers of the modules; refuse from them alone what cannot be combined.

    A plain sum is checked in its space; where other spaces or methods take part, only what all
    need is (kind and base), and the rest when they are evaluated.
    """
    plain = all(isinstance(n, trees.Leaf | trees.Negation) for n in trees.nodes(tree))
    headers = common.read_headers(paths, used, config, spaces=() if plain else ("delta",))
    for node in trees.nodes(tree):
        if isinstance(node, trees.Merge):
            resolve(node.choice.method, node.choice.as_dict(), headers[0].kind)
    return headers


def bindings(pairs: Sequence[str], where: str = "--module") -> dict[str, str]:
    """name -> directory from NAME=DIR.

    Raises:
        UsageError: no '=', a name that the grammar cannot read, or a name given twice.
    """
    bound: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UsageError.build(
                where, "not a binding", found=repr(pair), expected="NAME=DIR, such as a=runs/a"
            )
        if name in bound:
            raise UsageError.build(
                where, "a name given twice", found=name, do="give each name once"
            )
        if name in FUNCTIONS:
            raise UsageError.build(
                where, "the name of a function", found=name, do="choose another name"
            )
        bound[name] = path
    return bound


def check_names(
    used: Sequence[str], modules: Collection[str], layers: Collection[str] = ()
) -> None:
    """Refuse a name without a module, and a module without a use."""
    for name in used:
        if name not in modules:
            raise UsageError.build(
                "expression",
                f"no module named '{name}'",
                found=f"names {sorted(modules)}",
                do=f"add --module {name}=DIR",
            )
    for name in [*modules, *layers]:
        if name not in used:
            raise UsageError.build(
                "--module",
                "a module that the expression does not use",
                found=name,
                do="leave it out",
            )
