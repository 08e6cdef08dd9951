"""``pem check``: can these modules be combined, and what stands in the way; from headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.algebra import is_neutral
from pem_composition.checkpoint import load
from pem_composition.checkpoint.doctor import ERROR, NOTE, WARNING, Finding, diagnose
from pem_composition.cli import common
from pem_composition.cli.columns import wrapped
from pem_composition.cli.flags import SPACES, check_count
from pem_composition.cli.inspect import drift
from pem_composition.config import LoraConfig
from pem_composition.errors import EXIT_BAD_INPUT, EXIT_DONE, PEMError
from pem_composition.flag_declarations import flag, required

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.checkpoint.doctor import Diagnosis, Finding

NAME = "check"
HELP = "can these modules be combined? every difference with its remedy; exit code 0 yes, 2 no"
EXAMPLES = """
  pem check runs/rte-0 runs/rte-1
  pem check runs/rte runs/mnli --model roberta-base --space parameter
  pem check runs/rte-0 runs/rte-1 --values --json
"""
SCHEMA = "pem.check/1"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem check."""

    directories: tuple[str, ...] = required("module directories", positional=True, metavar="DIR")
    model: str | None = flag(
        None,
        "base model: compare its fingerprint, tokenizer and embeddings, too",
        short="-m",
        metavar="MODEL",
    )
    space: str | None = flag(
        None, "the space that has to take the modules (default: any)", choices=SPACES
    )
    values: bool = flag(
        False,
        "read the tensors, too: checksums, NaN and infinities, updates that are zero, "
        "drift from the initial module",
    )
    adatasks: tuple[str, ...] = flag((), "one name per module", short="-t", metavar="NAME")
    allow_base_mismatch: bool = flag(False, "bases that are recorded as different are no obstacle")
    json: bool = flag(False, "one JSON object instead of text")


def run(config: Config) -> int:
    """Print the findings and what they mean; 0 if the modules can be combined, else 2."""
    if config.adatasks:
        check_count("--adatasks", config.adatasks, len(config.directories), "name")
    names = common.labels(config.directories, config.adatasks)
    base = common.resolved(config.model) if config.model else None
    found = diagnose(
        config.directories,
        names,
        model=base,
        allow_base_mismatch=config.allow_base_mismatch,
        space=config.space,
    )
    values = _values(found.headers, base) if config.values else []
    broken = any(f.severity == "error" for f in values)
    compatible = found.compatible and not broken
    if config.space is not None:
        compatible = found.refused[config.space] is None and not broken
    facts = to_json(found, values, compatible=compatible)
    print(json.dumps(facts) if config.json else text(facts))
    return EXIT_DONE if compatible else EXIT_BAD_INPUT


def to_json(found: Diagnosis, values: list[Finding], *, compatible: bool) -> dict[str, Any]:
    """The diagnosis as plain values; the schema is in docs/explain.md."""
    return {
        "schema": SCHEMA,
        "compatible": compatible,
        "modules": [_module(h) for h in found.headers],
        "findings": [asdict(f) for f in (*values, *found.findings)],
        "spaces": {
            space: {"accepts": reason is None, "reason": reason}
            for space, reason in found.refused.items()
        },
        "head_policies": list(found.heads),
        "programs": list(_programs(found)) if compatible else [],
    }


def _module(header: ModuleHeader) -> dict[str, Any]:
    config = header.config
    rank = {"r": config.r, "alpha": config.alpha} if isinstance(config, LoraConfig) else {}
    return {
        "name": header.name,
        "path": str(header.path),
        "kind": header.kind,
        "format": header.format,
        **rank,
        "layers": len(header.layers),
        "base": header.base.name,
        "labels": list(header.head.labels) if header.head else [],
    }


def _programs(found: Diagnosis) -> Iterator[str]:
    """Programs that take the modules, with the space where only one does."""
    spaces = [space for space, reason in found.refused.items() if reason is None]
    flag = "" if len(spaces) > 1 else f" --space {spaces[0]}"
    several = {"merge.py": 1, "analogy.py": 3, "pem compose": 1, "pem sweep": 2, "negation.py": 1}
    count = len(found.headers)
    for name, least in several.items():
        exactly = name == "analogy.py"
        if name == "pem compose" and any(
            h.kind == "full" and h.base.name is None for h in found.headers
        ):
            continue  # it takes no base: pem fold does
        if (count == least) if exactly else (count >= least):
            alone = " (each alone)" if name == "negation.py" and count > 1 else ""
            yield f"{name}{'' if alone else flag}{alone}"


def _values(headers: tuple[ModuleHeader, ...], base: str | None) -> list[Finding]:
    """What only the tensors tell; those of whole models are differences to the base."""
    found = []
    for header in headers:
        try:
            own = base if header.kind == "full" else None
            module = load(header.path, name=header.name, base=own)
        except PEMError as error:
            found.append(Finding(ERROR, "its values cannot be used", {header.name: str(error)}))
            continue
        idle = [
            n.rpartition(".")[0]
            for n, t in module.adapter_tensors().items()
            if not n.endswith(".lora_A") and is_neutral(n, t)
        ]
        if idle:
            what = f"{len(idle)} of {len(module.layers)} layers change nothing, e.g. {idle[0]}"
            do = "was it trained? a new module is the base model"
            found.append(Finding(WARNING, "its update is zero", {header.name: what}, do))
        found += _drift(header)
    return found


def _drift(header: ModuleHeader) -> Iterator[Finding]:
    initial = (header.provenance.training.get("flags") or {}).get("init_from")
    if not initial:
        return
    try:
        moved = drift(str(header.path), str(initial))
    except PEMError as error:
        yield Finding(NOTE, "drift cannot be told", {header.name: str(error)})
        return
    shown = ", ".join(f"{role} {value:.2f}" for role, value in moved.items())
    yield Finding(NOTE, "moved from its initial module, relative to its norm", {header.name: shown})


# --- text ---------------------------------------------------------------------------------------


def text(facts: Mapping[str, Any]) -> str:
    """Findings, worst first, then the verdicts."""
    lines = [_summary(m) for m in facts["modules"]]
    for finding in facts["findings"]:
        lines += ["", f"{finding['severity']}: {finding['what']}"]
        lines += [wrapped(f"    {name}: {v}", indent=8) for name, v in finding["values"].items()]
        if finding["do"]:
            lines.append(wrapped(f"    -> {finding['do']}", indent=8))
    lines.append("")
    for space, verdict in facts["spaces"].items():
        said = "yes" if verdict["accepts"] else f"no ({verdict['reason']})"
        lines.append(_verdict(f"{space} space", said))
    if facts["head_policies"]:
        lines.append(_verdict("--head", ", ".join(facts["head_policies"])))
    if facts["programs"]:
        lines.append(_verdict("programs", ", ".join(facts["programs"])))
    lines.append("compatible" if facts["compatible"] else "not compatible")
    return "\n".join(lines)


def _summary(module: Mapping[str, Any]) -> str:
    rank = f" r {module['r']} alpha {module['alpha']:g}," if "r" in module else ""
    base = f", base {module['base']}" if module["base"] else ""
    return wrapped(
        f"{module['name']}: {module['kind']},{rank} {module['layers']} layers{base}", indent=8
    )


def _verdict(what: str, said: str) -> str:
    return wrapped(f"{what:<16} {said}", indent=17)
