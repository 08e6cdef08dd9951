"""``pem inspect``: what module directories hold, from their headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.labels import expression_of
from pem_composition.cli.common import Facts
from pem_composition.config import LoraConfig
from pem_composition.errors import CheckpointError, PEMError

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader

NAME = "inspect"
HELP = "print kind, rank, layers, base model and provenance of modules; can they be combined?"
EXAMPLES = """
  pem inspect -a runs/rte-0 runs/rte-1
  pem inspect -a runs/merged --json
  pem inspect -a runs/rte-0 runs/rte-1 --init runs/init
  pem inspect -a runs/rte runs/mnli --init own
"""
OWN = "own"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem inspect."""

    adapters: tuple[str, ...] = field(
        metadata={"short": "-a", "metavar": "DIR", "help": "module directories"}
    )
    init: str | None = field(
        default=None,
        metadata={
            "metavar": "DIR",
            "help": "initial module; adds how far training moved from it. own: the one that each "
            "module was trained from",
        },
    )
    json: bool = field(default=False, metadata={"help": "one JSON object per module"})


def run(config: Config) -> int:
    """Print one block per module, then whether they can be combined."""
    from pem_composition.checkpoint import inspect_header

    headers = [inspect_header(path) for path in config.adapters]
    for path, header in zip(config.adapters, headers, strict=True):
        facts = {"path": path, **describe(header)}
        if config.init is not None:
            facts["drift"] = drift(path, _initial(path, header, config.init))
        print(json.dumps(facts) if config.json else _block(facts))
    if len(headers) > 1 and not config.json:
        for space in ("parameter", "delta"):
            print(f"combination in {space} space: {_verdict(headers, space)}")
    return 0


def describe(header: ModuleHeader) -> dict[str, Any]:
    """The facts of a header that are worth a line."""
    config, base, origin = header.config, header.base, header.provenance
    facts: dict[str, Any] = {"kind": header.kind}
    if isinstance(config, LoraConfig):
        facts |= {"r": config.r, "alpha": config.alpha, "use_rslora": config.use_rslora}
    facts |= {
        "targets": list(getattr(config, "target_modules", ())),
        "layers": len(Facts.of(header).layers),
        "base": base.name,
        "model_type": base.model_type,
        "base_fingerprint": base.fingerprint,
        "head": header.head is not None,
        "labels": list(header.head.labels) if header.head else [],
        "expression": expression_of(origin),
        "space": origin.space,
        "init": origin.init,
        "notes": list(origin.notes),
    }
    return facts


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
    from pem_composition.arithmetic import updates
    from pem_composition.checkpoint import load

    moved = updates.drift(load(path).tensors, load(initial).tensors)
    return {role: round(value, 4) for role, value in moved.items()}


def _block(facts: dict[str, Any]) -> str:
    """``key: value`` lines; what is unknown or empty is left out."""
    lines = [str(facts["path"])]
    for key, value in facts.items():
        if isinstance(value, dict):
            value = [f"{k} {v:g}" for k, v in value.items()]
        if key != "path" and value not in (None, "", []):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"  {key.replace('_', ' '):<16} {shown}")
    return "\n".join(lines)


def _verdict(headers: list[ModuleHeader], space: str) -> str:
    from pem_composition.arithmetic.compatible import check_compatible

    try:
        check_compatible([Facts.of(h) for h in headers], space=space)
    except PEMError as error:
        return f"no ({error})"
    return "yes"
