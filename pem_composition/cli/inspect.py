"""``pem inspect``: what module directories hold; from their headers alone unless values are asked.

Headers cost milliseconds and no torch; ``--values`` reads the tensors, ``--init`` two modules each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic import updates
from pem_composition.arithmetic.comparison import profile
from pem_composition.arithmetic.compatible import check_compatible
from pem_composition.arithmetic.labels import expression_of
from pem_composition.checkpoint import inspect_header, load
from pem_composition.checkpoint.doctor import spaces_of
from pem_composition.cli.columns import short_names, table
from pem_composition.cli.common import resolved
from pem_composition.config import LoraConfig
from pem_composition.errors import CheckpointError, PEMError, UsageError, printable
from pem_composition.flag_declarations import flag
from pem_composition.record import REFIT

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.record import Provenance

NAME = "inspect"
HELP = "kind, rank, layers, base, provenance of modules; --values: norms and effective ranks"
EXAMPLES = """
  pem inspect runs/rte-0 runs/rte-1
  pem inspect runs/merged --values
  pem inspect runs/merged --json
  pem inspect runs/rte-0 runs/rte-1 --init runs/init
  pem inspect runs/rte runs/mnli --init own
"""
SCHEMA = "pem.inspect/1"
OWN = "own"
TRAINING_FLAGS = (
    "task_name", "joint_tasks", "train_file", "freeze", "learning_rate", "max_steps", "seed",
)  # fmt: skip
HIDDEN = ("schema", "path", "values", "sources")
LEGEND = """\
norm ||dW||_F, largest ||dW||_2, rank numerical, stable ||dW||_F^2 / ||dW||_2^2,
entropy exp(-sum p ln p) of p = s / sum(s), s the singular values of dW"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem inspect."""

    directories: tuple[str, ...] = flag(
        (), "module directories", positional=True, nargs="*", metavar="DIR"
    )
    adapters: tuple[str, ...] = flag(
        (), "the same, as in other programs", short="-a", metavar="DIR"
    )
    values: bool = flag(False, "read the tensors: norm and ranks of every layer's update")
    model: str | None = flag(
        None,
        "--values of whole models: their base (default: the recorded one)",
        short="-m",
        metavar="MODEL",
    )
    init: str | None = flag(
        None,
        "initial module; adds how far training moved from it. own: the one that each "
        "module was trained from",
        metavar="DIR",
    )
    json: bool = flag(False, "one JSON object per module")

    @property
    def paths(self) -> tuple[str, ...]:
        """What to look at.

        Raises:
            UsageError: nothing.
        """
        if not (self.directories or self.adapters):
            raise UsageError.build("DIR", "no module directory", expected="at least one")
        return (*self.directories, *self.adapters)


def run(config: Config) -> int:
    """Print one block per module, then whether they can be combined."""
    headers = [inspect_header(path) for path in config.paths]
    for path, header in zip(config.paths, headers, strict=True):
        facts = {"schema": SCHEMA, "path": path, **describe(header)}
        if config.init is not None:
            facts["drift"] = drift(path, _initial(path, header, config.init))
        if config.values:
            facts["values"] = values(path, config.model)
        print(json.dumps(facts) if config.json else _block(facts))
    if len(headers) > 1 and not config.json:
        for space in spaces_of(headers):
            print(f"combination in {space} space: {_verdict(headers, space)}")
    return 0


def describe(header: ModuleHeader) -> dict[str, Any]:
    """The facts of a header, by the names that docs/explain.md explains."""
    config, base = header.config, header.base
    facts: dict[str, Any] = {"kind": header.kind, "format": header.format}
    layers = header.layers
    if isinstance(config, LoraConfig):
        ranks = Counter(config.rank(layer) for layer in layers)
        facts |= {"r": config.r, "alpha": config.alpha, "use_rslora": config.use_rslora}
        facts |= {"ranks": {str(r): n for r, n in sorted(ranks.items())}} if len(ranks) > 1 else {}
    facts |= {
        "targets": list(getattr(config, "target_modules", ())),
        "layers": len(layers),
        "parameters": sum(map(prod, header.shapes.values())),
        "dtypes": dict(sorted(Counter(i.dtype for i in header.infos.values()).items())),
        "base": base.name,
        "model_type": base.model_type,
        "base_fingerprint": base.fingerprint,
        "head": header.head is not None,
        "head_parameters": sum(map(prod, header.head_shapes.values())),
        "labels": list(header.head.labels) if header.head else [],
        "heads": {name: list(info.labels) for name, info in header.heads.items()},
    }
    return facts | _origin(header.provenance) | {"sha256": header.sha256}


def _origin(origin: Provenance) -> dict[str, Any]:
    """Where a module comes from."""
    flags, error = origin.training.get("flags") or {}, origin.certificate
    return {
        "expression": expression_of(origin),
        "space": origin.space,
        "method": origin.method,
        "head_policy": origin.head_policy,
        "certificate": error.total if error and math.isfinite(error.total) else None,
        "rebuildable": origin.recipe is not None,
        "sources": [asdict(s) for s in origin.sources],
        "init": origin.init,
        "training": {k: flags[k] for k in TRAINING_FLAGS if flags.get(k) is not None},
        "refit": origin.training.get(REFIT),
        "notes": list(origin.notes),
    }


def _initial(path: str, header: ModuleHeader, given: str) -> str:
    """The initial module's directory.

    Raises:
        CheckpointError: ``own``, and the module does not say what it was trained from.
    """
    if given != OWN:
        return given
    origin = header.provenance
    recorded = origin and origin.training.get("flags", {}).get("init_from")
    if not recorded:
        raise CheckpointError.build(
            path, "no record of an initial module", expected="a module trained with --init_from",
            do="name its directory (--init DIR)",
        )  # fmt: skip
    return str(recorded)


def drift(path: str, initial: str) -> dict[str, float]:
    """Role -> distance from the initial module over the initial norm."""
    moved = updates.drift(load(path).tensors, load(initial).tensors)
    return {role: round(value, 4) for role, value in moved.items()}


def values(path: str, model: str | None) -> dict[str, Any]:
    """Norms and ranks of the update, in total and per layer."""
    return asdict(profile(load(path, base=resolved(model) if model else None)))


def _block(facts: Mapping[str, Any]) -> str:
    """``key: value`` lines, tables below; what is unknown or empty is left out."""
    lines = [str(facts["path"])]
    for key, value in facts.items():
        if key in HIDDEN or value in (None, "", [], {}, False):
            continue
        if isinstance(value, dict):
            value = [f"{k} ({_listed(v)})" if isinstance(v, list) else f"{k} {_listed(v)}"
                     for k, v in value.items()]  # fmt: skip
        lines.append(f"  {key.replace('_', ' '):<16} {_listed(value)}")
    if facts["sources"] and facts["space"]:
        found = [
            (s["name"], (s["sha256"] or "in memory")[:16], s["path"]) for s in facts["sources"]
        ]
        rows = [tuple(_listed(cell) for cell in row) for row in found]
        lines += ["", _indented(table(("input", "sha256", "read from"), rows, words=3))]
    if facts.get("values"):
        lines += ["", _indented(_profile_table(facts["values"]))]
    return "\n".join(lines)


def _listed(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return printable(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _indented(text: str) -> str:
    return "\n".join("  " + line if line else "" for line in text.splitlines())


def _profile_table(profile: Mapping[str, Any]) -> str:
    """One line per layer and the total; columns that the kind does not have are left out."""
    prefix, short = short_names(list(profile["layers"]))
    columns = {"norm": "norm", "spectral_norm": "largest", "rank": "rank"}
    columns |= {"stable_rank": "stable", "effective_rank": "entropy"}
    found = [c for c in columns if any(row[c] is not None for row in profile["layers"].values())]
    rows = [
        (name, *(row[c] for c in found))
        for name, row in zip(short, profile["layers"].values(), strict=True)
    ]
    rows.append(("total", profile["norm"], *[""] * (len(found) - 1)))
    title = f"layer of {prefix.rstrip('.')}" if prefix else "layer"
    text = table((title, *(columns[c] for c in found)), rows)
    return f"{text}\n{LEGEND}" if len(found) > 1 else text


def _verdict(headers: list[ModuleHeader], space: str) -> str:
    try:
        check_compatible(headers, space=space)
    except PEMError as error:
        return f"no ({error})"
    return "yes"
