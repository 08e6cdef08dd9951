"""Which flags name what a program reads and what it writes; no output replaces what is read.

The table holds for all programs: a name means the same everywhere. A flag that is not in it and
whose value names something on disk counts as read, so that a new flag cannot lose data.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pem_composition.checkpoint.files import check_apart
from pem_composition.checkpoint.layouts import is_foreign
from pem_composition.checkpoint.provenance import find_base
from pem_composition.cli.common import resolved
from pem_composition.errors import UsageError
from pem_composition.safe_files import check_makeable

READS = frozenset(
    {
        "adapter", "adapters", "answers", "against", "base", "comments", "compare", "config",
        "comparison", "data", "data_dir", "directories", "directory", "exclude", "fisher_list",
        "gram_list", "guard_file", "harness_include",
        "init", "init_from", "input_file", "join", "instruction_file", "joint_module", "judge",
        "merge_with", "model",
        "model_name_or_path",
        "module", "perplexity_file", "prompt", "prompt_file", "reference_module", "results",
        "shots", "source", "subspace_list", "template", "test_file", "text_file", "texts",
        "train_file", "tuned", "validation_file",
    }
)  # fmt: skip
# Words, names of columns and the like; a checkpoint to resume from lies in the output itself.
WORDS = frozenset(
    {
        "adatasks", "api_key_env", "axes", "base_url", "constraint", "device",
        "device_map", "expression", "goal", "harness_tasks",
        "head", "instruction", "joint_tasks", "key_class", "label_column", "label_column_name",
        "labels",
        "max_shard_size", "merge_way", "method", "methods",
        "metric_for_best_model", "name", "prefix", "purpose", "repository", "revision",
        "resume_from_checkpoint",
        "score_column", "search", "served_model_name", "set_name", "setting", "storage",
        "target_modules", "task_name", "text_column", "text_column_names", "toxic_label",
    }
)  # fmt: skip
FOLDER, FILE = "folder", "file"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a path drops one of two slashes
WRITES = {
    "html": FILE, "leaderboard": FILE, "out": FOLDER, "output": FILE, "output_dir": FOLDER,
    "output_file": FILE, "save_path": FOLDER,
}  # fmt: skip
# Programs that add files of these names to a folder and leave everything else in it.
ADDED = {
    "compare": r"comparison\.json|heatmap(-\d+)?\.(png|pdf)",
    "evaluate": r".*_results\.json|samples_.*\.jsonl",
    "perplexity": r".*_results\.json",
    "report": r"table\.(md|csv)|report\.html|.*\.(png|pdf)",
}


def check(config: Any, program: str) -> list[Path]:
    """Refuse an output that cannot be, or would replace, hold or lie in what the program reads.

    Returns:
        The outputs.

    Raises:
        CheckpointError: naming both.
        UsageError: an output that is an address, or two of one path.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    written = {name: kind for name, kind in WRITES.items() if values.get(name) is not None}
    outputs = []
    read, rows = (list(_read(values)), list(_rows(values))) if written else ([], [])
    for name, kind in written.items():
        out = Path(values[name])
        if URL.match(str(out)):
            raise UsageError.build(
                f"--{name}", "an address, where a path is needed", found=out,
                expected="a folder or file on this machine, such as runs/merged",
            )  # fmt: skip
        do = "choose another " + ("OUT" if name == "out" else f"--{name}")
        if name == "save_path" and values.get("adatasks"):
            out = out / "_".join(values["adatasks"])
        outputs.append(out)
        check_makeable(out, file=kind == FILE)
        if kind == FOLDER and program not in ADDED:
            check_apart(out, read, rows=rows, do=do)
            continue
        added = [out] if kind == FILE else list(_added(out, ADDED[program]))
        for file in added:
            check_apart(file, read, rows=rows, do=do, inside=not is_foreign(file.name))
    for one, other in zip(list(written)[1:], written, strict=False):
        if Path(values[one]).resolve() == Path(values[other]).resolve():
            raise UsageError.build(f"--{one}", f"the same path as --{other}", do="name another")
    return outputs


def _added(folder: Path, names: str) -> Iterator[Path]:
    """Files of these names that are there already."""
    if folder.is_dir():
        yield from (file for file in folder.iterdir() if re.fullmatch(names, file.name))


def _read(values: dict[str, Any]) -> Iterator[str]:
    """What the flags name to be read, rows of --data_dir apart, as far as it is there."""
    for name, value in values.items():
        if name in WORDS or name in WRITES or name == "data_dir":
            continue
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str | Path):
                yield from _places(str(text), name)


def _rows(values: dict[str, Any]) -> Iterator[str]:
    """The folders of --data_dir, and those of the tasks in them."""
    folders, tasks, joint = (
        [value] if isinstance(value, str) else value
        for value in (values.get(name) or () for name in ("data_dir", "task_name", "joint_tasks"))
    )
    for folder in folders:
        for task in ["", *tasks, *joint]:
            yield from _places(str(Path(folder, task)), "data_dir")


def _places(text: str, name: str) -> Iterator[str]:
    """The path, that behind NAME=, or the folder of a model that has a name."""
    if not text or "\0" in text:
        return
    if name == "module":
        text = text.partition("=")[2] or text
    elif name in ("model", "model_name_or_path", "base"):
        text = resolved(text)
    for place in (text, find_base(text)):
        if place is not None and Path(place).expanduser().exists():
            yield str(place)
