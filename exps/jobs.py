"""An experiment script as arrays of Slurm jobs.

    bash exps/.../run_all.sh --slurm [SBATCH FLAG...]       with DRY_RUN=1: print, submit nothing

A job is a script that the started one would run (a training, a sweep), with the values it would be
given, or a command of its own (a table over seeds). All jobs stand in one list, a file of lines of
bash: line N is what task N of ``exps/array.sh`` runs. A job starts when those that write what it
reads have succeeded (``afterok``). This follows from the paths in the commands of a dry run.
Jobs that wait for the same ones are one array.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from exps import hyperparameters
from pem_composition.cli.paths import WRITES
from pem_composition.errors import EXIT_DONE, PEMError, RunFailed, UsageError

ARRAY = "exps/array.sh"
NAME = re.compile(r"^#SBATCH --job-name=(\S+)", re.MULTILINE)
OUTPUTS = tuple(f"--{name}" for name in WRITES)


@dataclass(frozen=True)
class Job:
    """One line of bash, the words of the commands it runs, and the paths that these write."""

    line: str
    words: frozenset[str]
    writes: frozenset[str]

    @classmethod
    def of(cls, line: str, commands: Sequence[Sequence[str]]) -> Job:
        words = frozenset(word for command in commands for word in command)
        return cls(line, words, frozenset(p for command in commands for p in _written(command)))


def _written(command: Sequence[str]) -> Iterator[str]:
    if command[:1] == ["cp"]:
        yield command[-1]
    for flag, value in itertools.pairwise(command):
        if flag in OUTPUTS:
            yield value


# --- the list -----------------------------------------------------------------------------------


def planned(script: Path, variables: Mapping[str, str]) -> list[Job]:
    """The jobs of a script, in the order in which it would run them.

    Raises:
        SystemExit: the script refuses a value; it has said which.
    """
    text = script.read_text(encoding="utf-8")
    if not hyperparameters.CHILD.search(text):
        names = sorted((hyperparameters.known_to(text) | {"PYTHON"}) - {"DRY_RUN"})
        given = [f"{name}={variables[name]}" for name in names if name in variables]
        printed = _run(script, {**variables, "DRY_RUN": "1"}).splitlines()
        line = _quoted("child", os.path.relpath(script, hyperparameters.ROOT), *given)
        return [Job.of(line, [shlex.split(command) for command in printed])]
    jobs = []
    with tempfile.NamedTemporaryFile(prefix="pem-jobs-") as file:
        _run(script, {**variables, "PEM_JOBS": file.name})
        for (kind, *words), found in _noted(Path(file.name).read_text("utf-8", "surrogateescape")):
            if kind == "step":
                jobs.append(Job.of(_quoted(kind, *words), [words[1:]]))
            else:
                own = dict(word.split("=", 1) for word in words[1:])
                own = {n: v for n, v in (found | own).items() if n != "PEM_JOBS"}
                jobs += planned(hyperparameters.ROOT / words[0], own)
    return jobs


def _run(script: Path, variables: Mapping[str, str]) -> str:
    done = subprocess.run(
        ["bash", str(script)], env=dict(variables), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def _noted(text: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What ``noted`` of common.sh wrote: how many words, the words, the variables, an empty one."""
    fields = iter(text.split("\0"))
    for count in fields:
        if count:
            words = [next(fields) for _ in range(int(count))]
            yield words, dict(entry.split("=", 1) for entry in iter(lambda: next(fields), ""))


def _quoted(*words: str) -> str:
    """Words for bash, on one line."""
    return " ".join(shlex.quote(word).replace("\n", "'$'\\n''") for word in words)


def awaited(jobs: Sequence[Job]) -> list[tuple[int, ...]]:
    """For each job the earlier ones that it waits for: for each path that it reads and does not
    write itself, the job that writes it; of several that do, one."""
    writers: dict[str, list[int]] = {}
    found = []
    for number, job in enumerate(jobs):
        read = [_writers(word, writers) for word in job.words if not _within(word, job.writes)]
        chosen: set[int] = set()
        for some in sorted(filter(None, read), key=lambda some: (len(some), some)):
            if chosen.isdisjoint(some):
                chosen.add(some[0])
        found.append(tuple(sorted(chosen)))
        for path in job.writes:
            writers.setdefault(path, []).append(number)
    return found


def _writers(word: str, writers: Mapping[str, list[int]]) -> list[int]:
    return next((writers[path] for path in _places(word) if path in writers), [])


def _within(word: str, written: frozenset[str]) -> bool:
    return any(path in written for path in _places(word))


def _places(word: str) -> list[str]:
    """A path and the folders it lies in."""
    return [word, *map(str, PurePath(word).parents)]


@dataclass(frozen=True)
class Array:
    """Lines ``first`` to ``last`` of the list, and the lines that they wait for."""

    first: int
    last: int
    after: tuple[int, ...]


def arrays(jobs: Sequence[Job]) -> tuple[list[str], list[Array]]:
    """The lines of the list, numbered from 1, and the arrays, those that are waited for first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, after in enumerate(awaited(jobs)):
        groups.setdefault(after, []).append(number)
    order = [number for members in groups.values() for number in members]
    line_of = {number: line for line, number in enumerate(order, 1)}
    found = []
    for after, members in groups.items():
        lines = [line_of[number] for number in members]
        found.append(Array(lines[0], lines[-1], tuple(sorted(line_of[n] for n in after))))
    return [jobs[number].line for number in order], found


# --- Slurm --------------------------------------------------------------------------------------


def submit(path: Path, found: Sequence[Array], flags: Sequence[str], *, dry: bool) -> list[str]:
    """Submit the arrays of a list; all of them or none.

    Args:
        dry: print the commands instead, with A1, A2, ... for the numbers that Slurm would give.

    Returns:
        The numbers of the arrays.

    Raises:
        RunFailed: sbatch refused one; those before it have been cancelled.
    """
    numbers: list[str] = []
    array_of: dict[int, str] = {}
    for one in found:
        command = [
            "sbatch", "--parsable", f"--job-name={path.name}", f"--array={one.first}-{one.last}",
            f"--output={path.parent.parent}/logs/slurm/%x-%A_%a.out", *flags,
        ]  # fmt: skip
        if one.after:
            tasks = ":".join(f"{array_of[line]}_{line}" for line in one.after)
            command += [f"--dependency=afterok:{tasks}", "--kill-on-invalid-dep=yes"]
        command += [ARRAY, str(path)]
        if dry:
            sys.stdout.write(f"{shlex.join(command)}\n")
            number = f"A{len(numbers) + 1}"
        else:
            number = _sbatch(command, numbers)
        numbers.append(number)
        array_of |= dict.fromkeys(range(one.first, one.last + 1), number)
    return numbers


def _sbatch(command: Sequence[str], before: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if before:
            subprocess.run(["scancel", *before], check=False)
        raise RunFailed.build(
            "sbatch", "refused an array of jobs; nothing stays submitted",
            found=(done.stderr or done.stdout).strip(),
            do="mend the flags after --slurm; where the list is too long for an array, give a part "
            "of the tasks, methods or SEEDS at a time",
        )  # fmt: skip
    return done.stdout.strip().split(";")[0]  # number;cluster


def _refuse_queued(name: str) -> None:
    """Two arrays of one list would do everything twice."""
    if not shutil.which("sbatch"):
        raise UsageError.build(
            "--slurm", "sbatch is not found", expected="the programs of Slurm on PATH",
            do="start this where jobs are submitted; without --slurm everything runs here",
        )  # fmt: skip
    command = ["squeue", "--me", "--noheader", "--format=%i", f"--name={name}"]
    queued = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if queued:
        raise UsageError.build(
            "--slurm", "this list is queued already", found=f"jobs {' '.join(queued)}",
            expected="none of them", do=f"wait for them, or: scancel --me --name={name}",
        )  # fmt: skip


def main(script: str, *flags: str) -> int:
    """Exit code: 0, or one line on stderr and the error's."""
    place, dry = Path(script), os.environ["DRY_RUN"] == "1"
    lines, found = arrays(planned(place, os.environ))
    text = "".join(f"{line}\n" for line in [f"# {place.name}: line N is task N", *lines])
    stem = NAME.search(place.read_text(encoding="utf-8"))
    name = f"{stem[1] if stem else place.stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    path = Path(os.environ["OUT"]) / "jobs" / name
    try:
        if dry:
            sys.stdout.write(text)
        else:
            _refuse_queued(name)
            steps = path.with_name(f"{name}.steps")
            shutil.rmtree(steps, ignore_errors=True)
            steps.mkdir(parents=True)
            (path.parent.parent / "logs" / "slurm").mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        numbers = submit(path, found, flags, dry=dry)
    except PEMError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if not dry:
        sys.stdout.write(f"{path}: {len(lines)} jobs in {len(numbers)} arrays\n")
        sys.stdout.write(f"squeue --me --name={name}\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
