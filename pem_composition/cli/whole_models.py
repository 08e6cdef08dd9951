"""Whole fine-tuned models in the programs: theta_0 + sum_i c_i (theta_i - theta_0), streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pem_composition.arithmetic.labels import expression_of
from pem_composition.checkpoint import combine_full, inspect_header
from pem_composition.checkpoint.content import CONFIG, MODEL_CONFIG
from pem_composition.cli import common
from pem_composition.cli import flags as shared
from pem_composition.errors import IncompatibleModules, UsageError


@dataclass(frozen=True)
class Models:
    """Directories of fine-tuned models and of the base, where one is given."""

    paths: tuple[str, ...]
    base: str | None


def models_of(flags: shared.ModelFlags, full_merge: bool = False) -> Models | None:
    """The models if the flags or the directories say that whole models are meant, else None.

    ``--full_merge --model DIR DIR ...`` lists them as the reference program does; otherwise they
    are --adapters and --model is their base.

    Raises:
        UsageError: both lists, or a flag of whole models for others.
    """
    if full_merge and not flags.adapters:
        return Models(flags.model, None)
    whole = full_merge or flags.adaconfig == "fft" or any(
        (Path(p) / MODEL_CONFIG).is_file() and not (Path(p) / CONFIG).exists()
        for p in flags.adapters
    )  # fmt: skip
    if not whole:
        if flags.tokens != "error":
            raise UsageError.build(
                "--tokens", "applies to whole models only", found=flags.tokens, do="leave it out"
            )
        return None
    if len(flags.model) > 1 and flags.model != flags.adapters:
        raise UsageError.build(
            "-m/--model",
            "the models are given twice",
            found=f"--adapters and {len(flags.model)} models",
            do="list the models in --adapters and their base in --model, or all in --model alone",
        )
    return Models(flags.adapters, flags.model[0] if len(flags.model) == 1 else None)


def refuse_grid(grid: Sequence[float] | None) -> None:
    """Whole models are not written point by point: each is as large as the base.

    Raises:
        UsageError: there is a grid.
    """
    if grid is not None:
        raise UsageError.build(
            "--grid",
            "writes one module per point, not whole models",
            do="add --evaluate, or give coefficients",
        )


def compose(
    models: Models,
    coefficients: Sequence[float],
    out: Path,
    flags: shared.ModelFlags,
    head: str,
    told: Sequence[str] = (),
) -> int:
    """Check the models by their headers, write the combination, print the line."""
    names = _check(models, out, flags)
    choice = flags.choice("full")
    combine_full(
        models.paths,
        coefficients,
        out,
        base=None if models.base is None else common.resolved(models.base),
        head=head,
        dtype=flags.dtype,
        method=choice.method,
        settings=choice.as_dict(),
        tokens=flags.tokens,
        names=names,
        overwrite=flags.overwrite,
    )
    written = inspect_header(out)
    expression = expression_of(written.provenance)
    common.report_line(out, expression, written.provenance, bool(written.head_shapes), told)
    return 0


def _check(models: Models, out: Path, flags: shared.ModelFlags) -> list[str]:
    """Names of the models, checked by their headers as far as no tensor is needed."""
    shared.check_dropout(flags.dropout_list, len(models.paths))
    common.check_output(out, flags.overwrite)
    if flags.format != "peft":
        raise UsageError.build(
            "--format", "whole models have one layout", found=flags.format, do="leave it out"
        )
    names = common.labels(models.paths, flags.adatasks)
    for path, header in zip(
        models.paths, common.read_headers(models.paths, names, flags, flags.adaconfig), strict=True
    ):
        if header.kind != "full":
            raise IncompatibleModules.build(
                "--full_merge",
                f"{path} is no whole model",
                found=f"kind {header.kind}",
                expected="a model directory",
            )
        common.check_model(
            [models.base] if models.base else [], [header], flags.allow_base_mismatch
        )
    return names
