"""What a result depends on: the one rule, for sweeps, searches, training and statistics. No torch.

    base          every byte of its weights, config.json, the files of its tokenizer
    module        every tensor, its configuration, its head and what the head's outputs are called
    rows          texts and labels in order; the task's classes and metrics; prompt or template
    settings      what the user chose that changes a number
    precision     dtype, bfloat16, quantised weights, the kind of device where it is no CPU
    versions      the numbers of this package, of torch and of transformers

A result is kept under the sha256 of all of it (``key_of``), so a changed input never meets an old
result; paths, dates of files and the text of the sources decide nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import safe_files
from pem_composition.checkpoint import content, locate, provenance
from pem_composition.checkpoint.provenance import checkpoint_files, find_base
from pem_composition.offline import MANIFEST, cache_root

if TYPE_CHECKING:
    from pem_composition.config import HeadInfo
    from pem_composition.tasks.data import Example
    from pem_composition.tasks.glue import Task

# The numbers of this package. Raise it by hand with a change that gives other numbers for the same
# inputs: results of other versions are then computed again. tests/evaluation/test_keys.py
# compares golden scores with it.
RESULTS = 4
VERSION = "results"  # the field that holds it
version = functools.cache(metadata.version)  # read from the disk once

GENERATION = "generation_config.json"
# Files of a model folder that decide: its configuration and whatever a tokenizer may be made of.
DECIDES = re.compile(r".+\.(json|txt|model|spm|codes|bpe|vocab|tiktoken|jinja)")
RECORDS = re.compile(
    r"(pem|trainer_state|adapter_config|preprocessor_config|processor_config|quantize_config"
    r"|.*_results|.*\.index)\.json|(LICENSE|NOTICE|USE_POLICY|requirements|.*README).*",
    re.IGNORECASE,
)
REMEMBERED = 1 << 20  # bytes from which on a file's digest is kept for the next run
SETTLED = 2.0  # seconds after which a file's time stamp tells a later change


def complete(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with the versions that decide, in the form that JSON gives it back."""
    versions = {VERSION: RESULTS, **{name: version(name) for name in ("torch", "transformers")}}
    return dict(json.loads(json.dumps({**identity, **versions}, allow_nan=False)))


def key_of(identity: Mapping[str, Any]) -> str:
    """sha256 of everything that decides a result."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def digest_of(value: object) -> str:
    """sha256 of texts, prompts or rows, as JSON writes them."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def base_digest(model: str | Path) -> str:
    """sha256 over a base's weights, configuration and tokenizer; its name where no file is there.

    How generation ends by default is apart, see ``generation_digest``: most results do not use it.
    """
    folder = find_base(str(model))
    if folder is None:
        return str(model)
    kept = [f for f in folder.iterdir() if _decides(f.name) and f.is_file()]
    return _digest_of(folder, {*checkpoint_files(folder), *kept})


def check_unchanged(model: str | Path) -> None:
    """Compare the weights of a folder that this package wrote with its pem.json.

    Raises:
        CheckpointError: a file that has changed since.
    """
    folder = Path(model)
    record = provenance.read(folder) if folder.is_dir() else None
    if record is not None:
        for path in checkpoint_files(folder):
            provenance.check_sha256(folder, path.name, file_digest(path), record)


def generation_digest(model: str | Path) -> str | None:
    """sha256 of a base's generation_config.json, for results that are made of written text."""
    folder = find_base(str(model))
    if folder is None or not (folder / GENERATION).is_file():
        return None
    return file_digest(folder / GENERATION)


def module_digest(path: str | Path, head: HeadInfo | None = None) -> str:
    """sha256 over a module's weights and configuration; provenance and cards do not count.

    Args:
        head: what the module's head answers, where results depend on it.
    """
    folder = locate(path)[0]
    known = {name: file_digest(folder / name) for name in content.content_files(folder)}
    found = content.content_digest(folder, known)
    answers = None if head is None else [list(head.labels), head.problem]
    return key_of({"content": found, "answers": answers})


def rows_digest(examples: Sequence[Example]) -> str:
    """sha256 over texts and labels in order, whatever the format of the file."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(json.dumps([e.text, e.text_pair, e.label]).encode() + b"\n")
    return digest.hexdigest()


def shared_rows(chosen_on: Iterable[Example], reported: Iterable[Example]) -> int:
    """How many of the reported rows have the texts of a row that was chosen on."""
    seen = {(e.text, e.text_pair) for e in chosen_on}
    return sum((e.text, e.text_pair) in seen for e in reported)


def task_content(task: Task) -> dict[str, Any]:
    """What decides how a task's rows are scored."""
    return {"task": task.name, "labels": list(task.labels), "metrics": list(task.metrics)}


def file_digest(path: Path) -> str:
    """sha256 of a file; that of a large one is kept by its inode, size and times.

    The times are those of content and inode both, so that a change that puts the first back is
    seen. Where the cache cannot be written the file is read again.
    """
    state = path.stat()
    if state.st_size < REMEMBERED:
        return safe_files.sha256_file(path)
    times = (state.st_mtime_ns, state.st_ctime_ns)
    name = key_of({"file": [state.st_dev, state.st_ino, state.st_size, *times]})
    kept = cache_root() / "digests" / name
    try:
        known = kept.read_text(encoding="ascii")
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    except (OSError, ValueError):
        pass
    found = safe_files.sha256_file(path)
    after = path.stat()
    unchanged = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (state.st_size, *times)
    if unchanged and time.time() - max(times) / 1e9 > SETTLED:
        _keep(kept, found)
    return found


def _keep(path: Path, text: str) -> None:
    """Write a hint for later runs, where that is possible."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        safe_files.write_text(path, text)


def _decides(name: str) -> bool:
    return bool(
        DECIDES.fullmatch(name)
        and not RECORDS.fullmatch(name)
        and name not in (GENERATION, MANIFEST)
    )


def _digest_of(folder: Path, paths: Iterable[Path]) -> str:
    parts = sorted(f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in paths)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
