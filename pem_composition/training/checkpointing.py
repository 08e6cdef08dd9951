"""Checkpoint directories: complete or recognisably not. No torch.

The last file of a checkpoint is its marker ``complete.json``: the step, the sha256 of every other
file, and the run (flags, data, base) it belongs to.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pem_composition.errors import UsageError
from pem_composition.safe_files import fsync, open_folder, sha256_file

MARKER = "complete.json"
PARTIAL = ".partial"
# What a checkpoint can be gone on from with another value: what is scored in the end, and how many
# processes share the rows of a batch.
FREE = frozenset({"--do_eval", "test rows", "processes"})
NAME = re.compile(r"checkpoint-(\d+)")
PATIENCE = 10.0  # seconds in which what a killed run has started ends


@contextmanager
def alone(output_dir: Path) -> Iterator[None]:
    """Hold an output folder: two runs at once would take each other's checkpoints for left behind.

    Where the file system has no locks nobody is refused.

    Raises:
        UsageError: another process trains into the folder.
    """
    with open_folder(output_dir) as descriptor:
        deadline = time.monotonic() + PATIENCE
        while _is_held(descriptor):
            if time.monotonic() > deadline:
                raise UsageError.build(
                    output_dir, "another process trains into it", expected="one run at a time",
                    do="wait for it, or choose another --output_dir",
                )  # fmt: skip
            time.sleep(0.1)
        yield


def _is_held(descriptor: int) -> bool:
    """True if another process has the lock; else it is taken, where there are locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def directory(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output_dir / f"checkpoint-{step}"


def partial(output_dir: Path, step: int) -> Path:
    """Where it is assembled before it is renamed."""
    return output_dir / f".checkpoint-{step}{PARTIAL}"


def all_of(output_dir: Path) -> list[Path]:
    """Checkpoint directories, newest step first."""
    if not output_dir.is_dir():
        return []
    found = [
        (int(m[1]), p) for p in output_dir.iterdir() if (m := NAME.fullmatch(p.name)) and p.is_dir()
    ]
    return [p for _, p in sorted(found, reverse=True)]


def seal(assembled: Path, final: Path, step: int, run: Mapping[str, Any]) -> None:
    """Write the marker, make everything durable and give the checkpoint its name."""
    files = sorted(p for p in assembled.rglob("*") if p.is_file())
    marker = {
        "step": step,
        "run": run,
        "files": {p.relative_to(assembled).as_posix(): sha256_file(p) for p in files},
    }
    (assembled / MARKER).write_text(json.dumps(marker, indent=1, sort_keys=True))
    for path in [*files, assembled / MARKER, *{p.parent for p in files}, assembled]:
        fsync(path)
    if final.exists():
        discard(final)
    assembled.rename(final)
    fsync(final.parent)


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """The marker of a complete checkpoint.

    Raises:
        UsageError: the marker is absent or damaged, or a file is absent or differs from its sha256.
    """
    try:
        marker = json.loads((checkpoint / MARKER).read_text())
        files, _ = dict(marker["files"]), dict(marker["run"])
    except FileNotFoundError:
        raise _incomplete(checkpoint, f"{MARKER} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise _incomplete(checkpoint, f"{MARKER} is damaged") from None
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise _incomplete(checkpoint, f"{name} is missing")
        if sha256_file(path) != expected:
            raise _incomplete(checkpoint, f"{name} has changed")
    return dict(marker)


def newest_complete(output_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Newest complete checkpoint; each newer incomplete one is skipped with a line."""
    for checkpoint in all_of(output_dir):
        try:
            read_marker(checkpoint)
        except UsageError as error:
            say(f"{error}; skipped")
        else:
            return checkpoint
    return None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Name -> ``old -> new`` for each part of the run that has to be the same and differs."""
    old, new = _flat(then), _flat(now)
    return {
        name: f"{_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted((old.keys() | new.keys()) - FREE)
        if old.get(name) != new.get(name)
    }


def rotate(output_dir: Path, keep: int | None, best_step: int | None) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one."""
    protected = directory(output_dir, best_step) if best_step else None
    for checkpoint in all_of(output_dir)[keep:] if keep else []:
        if checkpoint != protected:
            discard(checkpoint)


def discard(checkpoint: Path) -> None:
    """Remove a directory, renamed first, so that no half of it is ever taken for a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name.lstrip('.')}-removed{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def sweep_partial(output_dir: Path) -> None:
    """Remove what killed runs were assembling or removing."""
    for leftover in output_dir.glob(f".checkpoint-*{PARTIAL}") if output_dir.is_dir() else []:
        shutil.rmtree(leftover, ignore_errors=True)


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    flags = {f"--{k}": v for k, v in run.get("flags", {}).items()}
    return flags | {k: v for k, v in run.items() if k != "flags"}


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _incomplete(checkpoint: Path, why: str) -> UsageError:
    return UsageError.build(checkpoint, f"incomplete checkpoint: {why}")  # type: ignore[return-value]
