"""Whether a run resumes in its output directory, starts anew there, or is refused. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pem_composition.checkpoint.content import held_in
from pem_composition.config import ADAPTER_CONFIGS
from pem_composition.errors import UsageError
from pem_composition.evaluation.keys import VERSION
from pem_composition.safe_files import check_makeable
from pem_composition.training import checkpointing
from pem_composition.training.training_flags import TrainConfig, fields_of

# What a checkpoint's module and the state of its optimizer cannot be made to be.
FIXED = {f"--{name}" for kind in ADAPTER_CONFIGS for name in fields_of(kind)} | {
    "--adapter_config",
    "--freeze",
    "--objective",
    "--optim",
    "base",
}


def check_place(output: Path) -> None:
    """The result replaces the directory in one rename, which must be possible at the end.

    Raises:
        PEMError: no folder can be there, or it is the directory that the program runs in.
    """
    check_makeable(output)
    if Path.cwd().is_relative_to(output.resolve()):
        raise UsageError.build(
            f"--output_dir {output}",
            "cannot be replaced as a whole",
            found="the working directory",
            expected="a directory of its own",
            do="name another one",
        )


def refuse_undescribed(output: Path, done: Mapping[str, Any]) -> None:
    """The result of an earlier release cannot be verified, and is not replaced unasked.

    Raises:
        UsageError: it does not say everything that it depends on.
    """
    if "flags" in done and VERSION not in done.get("content", {}):
        raise UsageError.build(
            output, "holds a result of an earlier release, which does not say all it depends on",
            expected="a new directory",
            do="add --overwrite_output_dir to train anew, or choose another --output_dir",
        )  # fmt: skip


def find_resume(
    config: TrainConfig, identity: Mapping[str, Any], say: Callable[[str], None], *, finished: bool
) -> Path | None:
    """The checkpoint to resume from, None for a run from the beginning.

    Raises:
        UsageError: the directory holds an unfinished run with other settings, or something else.
    """
    output = Path(config.output_dir)
    named = config.resume_from_checkpoint
    word = str(named).lower()  # true and false as in the scripts of transformers
    if word in ("true", "false"):
        named = None
    if named:
        found: Path | None = Path(named)
        if not Path(named).is_dir():
            raise UsageError.build(
                f"--resume_from_checkpoint {named}", "no checkpoint",
                found="a file" if Path(named).exists() else "no such directory",
                expected="a folder checkpoint-STEP of a training run",
                do="correct the path, or leave the flag out to resume from the newest",
            )  # fmt: skip
    elif config.overwrite_output_dir and word != "true":
        return None
    else:
        ignored = config.ignore_checkpoints or word == "false"
        found = None if ignored else checkpointing.newest_complete(output, say)
    if found is None:
        _refuse_foreign(output, finished=finished)
        return None
    marker = checkpointing.read_marker(found)
    differences = checkpointing.differences(marker["run"], identity)
    changed = ", ".join(f"{name} {values}" for name, values in differences.items())
    other = FIXED & differences.keys()
    if not changed:
        say(f"resuming from {found}")
        return found
    if config.force_resume and not other:
        say(f"resuming from {found} although the run differs: {changed}")
        return found
    if finished and not named:
        say(f"{output}: finished with other settings ({changed}); training anew")
        return None
    force = "" if other else "add --force_resume to go on from it, or "
    raise UsageError.build(
        found,
        "belongs to a run with other settings",
        found=changed,
        expected="the same settings",
        do=force + "add --overwrite_output_dir to start anew",
    )


def _refuse_foreign(output: Path, *, finished: bool) -> None:
    """A module that no run of ours left here is not replaced unasked."""
    if (held := held_in(output)) and not finished:
        raise UsageError.build(
            output,
            "already holds a module",
            found=held,
            expected="a new or empty directory",
            do="choose another --output_dir or add --overwrite_output_dir",
        )


def clean(output: Path, *, keep_checkpoints: bool) -> None:
    """Remove what killed runs left half-made and, for a new run, the checkpoints of the old one."""
    checkpointing.sweep_partial(output)
    for old in [] if keep_checkpoints else checkpointing.all_of(output):
        checkpointing.discard(old)
