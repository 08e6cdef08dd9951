"""Initial modules on disk: the same numbers for every run that starts from them."""

from __future__ import annotations

from pathlib import Path

from pem_composition import safe_files
from pem_composition.errors import CheckpointError, UsageError
from pem_composition.evaluation import keys
from pem_composition.evaluation.model_names import resolve
from pem_composition.record import Provenance
from pem_composition.tasks.glue import Task
from pem_composition.training import results
from pem_composition.training.identity import initial_digest
from pem_composition.training.training_flags import AdapterFlags, fields_of


def write(flags: AdapterFlags, task: Task | None) -> str:
    """Write ``flags.output_dir`` and say what it holds; what is there already is not written again.

    Raises:
        UsageError: the directory holds something else.
    """
    output = Path(flags.output_dir)
    recipe = describe(flags, task)
    key = keys.key_of(recipe)
    if not flags.overwrite_output_dir and (there := _there(output, key)):
        return there
    from pem_composition.training.preparation import prepare

    start = prepare(flags, task)
    provenance = Provenance(init=start.init, training={"key": key, "initial": recipe})
    try:
        with safe_files.atomic_directory(output, overwrite=flags.overwrite_output_dir) as folder:
            start.weights.publish(folder, output.name, provenance)
    except CheckpointError:
        # Another process has written there meanwhile.
        if not flags.overwrite_output_dir and (there := _there(output, key)):
            return there
        raise
    return f"{output}: initial {flags.adapter_config} module, fingerprint {start.init[:12]}"


def _there(output: Path, key: str) -> str:
    """What is said where the directory holds the module already; empty for a free one.

    Raises:
        UsageError: it holds something else.
    """
    try:
        filled = any(output.iterdir())  # asked first: another process may publish meanwhile
    except (FileNotFoundError, NotADirectoryError):
        filled = False
    if results.read_training(output).get("key") == key:
        return f"{output}: already holds this initial module, skipped"
    if filled:
        raise UsageError.build(
            output,
            "is not empty",
            expected="a new directory",
            do="choose another or add --overwrite_output_dir",
        )
    return ""


def describe(flags: AdapterFlags, task: Task | None) -> dict[str, object]:
    """Everything that decides the initial numbers; without a head, no task does."""
    answers: dict[str, object] = (
        {"objective": flags.objective} if task is None else {"labels": list(task.labels)}
    )
    adapter = {name: getattr(flags, name) for name in fields_of(flags.adapter_config)}
    if flags.target_modules:
        adapter["target_modules"] = list(flags.target_modules)
    return keys.complete(
        {
            "base": keys.base_digest(resolve(flags.model_name_or_path)),
            "adapter_config": flags.adapter_config,
            **adapter,
            "seed": flags.seed,
            **answers,
            "init_from": initial_digest(flags.init_from),
        }
    )
