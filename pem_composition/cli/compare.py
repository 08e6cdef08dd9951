"""``pem compare``: how the updates of modules relate, pair by pair, before anything is merged."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.comparison import compare
from pem_composition.arithmetic.compatible import check_compatible
from pem_composition.checkpoint.several import read_modules
from pem_composition.cli import common
from pem_composition.cli.columns import short_names, table, wrapped
from pem_composition.cli.flags import check_count
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, required
from pem_composition.safe_files import files_added, write_json

if TYPE_CHECKING:
    from pem_composition.arithmetic.comparison import Comparison
    from pem_composition.module import PEM

NAME = "compare"
HELP = "cosine, subspaces, sign conflict, norms and cross terms of modules, by layer; heat maps"
EXAMPLES = """
  pem compare runs/rte-0 runs/rte-1
  pem compare runs/rte-0 runs/rte-1 --coefficients 0.3 0.7 -p runs/compared
  pem compare runs/rte runs/mnli runs/sst2 --layers --json
"""
SCHEMA = "pem.compare/1"
FILE = "comparison.json"
COLUMNS = {
    "cosine": "cosine",
    "norm_ratio": "ratio",
    "column_overlap": "columns",
    "row_overlap": "rows",
    "sign_conflict": "signs",
    "weighted_sign_conflict": "w.signs",
    "cross_term_error": "cross",
}
LEGEND = (
    "cosine of dW_a, dW_b; ratio of their norms |a| / |b|; columns, rows: mean cos^2 of the "
    "principal angles of their column and row spaces; signs: share of entries of opposite sign "
    "(w.signs: weighted by |x y|); cross: relative error of the paper's sum, coefficients "
    "{coefficients}, against the exact one"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem compare."""

    directories: tuple[str, ...] = required(
        "module directories, two or more", positional=True, metavar="DIR"
    )
    coefficients: tuple[float, ...] = flag(
        (),
        "of the sum whose cross terms are measured, one per module (default: 1/n each)",
        metavar="C",
    )
    layers: bool | None = flag(None, "print every layer (default: for one pair, not for several)")
    model: str | None = flag(
        None, "base of whole models (default: the recorded one)", short="-m", metavar="MODEL"
    )
    adatasks: tuple[str, ...] = flag((), "one name per module", short="-t", metavar="NAME")
    save_path: Path | None = flag(
        None,
        f"where {FILE} and a heat map per pair go (PNG, PDF); default: nowhere",
        short="-p",
        metavar="OUT",
    )
    allow_base_mismatch: bool = flag(
        False, "compare modules of bases that are recorded as different"
    )
    json: bool = flag(False, "one JSON object instead of tables")


def run(config: Config) -> int:
    """Compare, print, and write files where a place for them is named."""
    paths = config.directories
    if len(paths) < 2:
        raise UsageError.build("DIR", "wrong number of modules", found=1, expected="two or more")
    if config.coefficients:
        check_count("--coefficients", config.coefficients, len(paths), "coefficient")
    if config.adatasks:
        check_count("--adatasks", config.adatasks, len(paths), "name")
    names = common.labels(paths, config.adatasks)
    headers = common.headers_of(paths, names)
    check_compatible(headers, space="delta", allow_base_mismatch=config.allow_base_mismatch)

    base = common.resolved(config.model) if config.model else None
    modules = read_modules(headers, names, base)
    found = compare(
        modules, config.coefficients or None, allow_base_mismatch=config.allow_base_mismatch
    )
    facts = to_json(found, modules, paths)
    print(json.dumps(facts) if config.json else text(facts, config.layers))
    if config.save_path is not None:
        _write(facts, config.save_path, said=not config.json)
    return 0


def to_json(found: Comparison, modules: Sequence[PEM], paths: Sequence[str]) -> dict[str, Any]:
    """The comparison as plain values; the schema is in docs/explain.md."""
    described = [
        {"name": m.name, "path": path, "kind": m.kind, "sha256": m.provenance.sources[0].sha256}
        for m, path in zip(modules, paths, strict=True)
    ]
    return {"schema": SCHEMA, "modules": described, **asdict(found)}


def text(facts: Mapping[str, Any], layers: bool | None) -> str:
    """Totals of all pairs, layers where asked, and what the columns mean."""
    pairs = facts["pairs"]
    rows = [(p["a"], p["b"], *_cells(p["total"], COLUMNS)) for p in pairs]
    parts = [table(("a", "b", *COLUMNS.values()), rows, words=2)]
    for pair in pairs if layers or (layers is None and len(pairs) == 1) else ():
        parts.append(_layers(pair))
    weights = ", ".join(f"{c:.4g}" for c in facts["coefficients"])
    if len(facts["modules"]) > 2 and facts["cross_term_error"] is not None:
        parts.append(
            f"cross terms of the sum of all, coefficients {weights}: "
            f"{facts['cross_term_error']:.4g}"
        )
    notes = [wrapped(LEGEND.format(coefficients=weights))]
    refused = {p["refused"]: None for p in pairs if p["refused"]}
    notes += [wrapped(f"no sum in parameter space: {reason}", indent=4) for reason in refused]
    return "\n\n".join([*parts, "\n".join(notes)])


def _cells(measures: Mapping[str, Any], columns: Iterable[str]) -> list[str | None]:
    """Three digits after the point, so that columns stay narrow; of a ratio three in all."""
    return [
        None if (v := measures[c]) is None else f"{v:.3g}" if c == "norm_ratio" else f"{v:.3f}"
        for c in columns
    ]


def _layers(pair: Mapping[str, Any]) -> str:
    prefix, short = short_names(list(pair["layers"]))
    found = [c for c in COLUMNS if pair["total"][c] is not None]
    rows = [
        (name, *_cells(row, found))
        for name, row in zip(short, pair["layers"].values(), strict=True)
    ]
    title = f"layer of {prefix.rstrip('.')}" if prefix else "layer"
    lines = [
        f"{pair['a']} (a), {pair['b']} (b)",
        table((title, *(COLUMNS[c] for c in found)), rows),
    ]
    for which in ("a", "b"):
        only = pair[f"only_{which}"]
        if only:
            lines.append(f"only in {pair[which]}: {len(only)} layers, e.g. {only[0]}")
    return "\n".join(lines)


def _write(facts: Mapping[str, Any], out: Path, *, said: bool) -> None:
    from pem_composition.report import heatmap

    with files_added(out) as added:
        write_json(added / FILE, facts)
    with redirect_stdout(sys.stdout if said else sys.stderr):
        print(f"written: {out / FILE}")
        common.print_plots(lambda: heatmap.write(facts, out), "written")
