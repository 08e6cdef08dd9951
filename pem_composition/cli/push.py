"""``pem push``: put a module on the hub, with a card that says what it is and how it scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pem_composition import offline
from pem_composition.checkpoint import inspect_header
from pem_composition.checkpoint.card import Publication
from pem_composition.flag_declarations import flag, required
from pem_composition.record import Provenance
from pem_composition.safe_files import is_file, read_json
from pem_composition.tasks.glue import TASKS
from pem_composition.training.results import ALL

NAME = "push"
HELP = "put a module on the hub as org/name, with its record and a card; toxic modules are refused"
EXAMPLES = """
  pem push runs/merged org/merged
  pem push runs/rte org/rte --private --revision trial
"""
MEASURED = "eval_"
# What results say beside scores.
ASIDE = ("_stderr", "_samples", "_runtime", "_loss", "_steps_per_second", "_samples_per_second")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem push."""

    directory: str = required("module directory", positional=True, metavar="DIR")
    repository: str = required("its name on the hub", positional=True, metavar="ORG/NAME")
    private: bool = flag(False, "a repository that is made is seen by its owners alone")
    revision: str | None = flag(None, "branch; it is made where it is missing", metavar="BRANCH")


def run(config: Config) -> int:
    """Check by the header, upload, print the name with its commit."""
    header = inspect_header(config.directory)
    from pem_composition.checkpoint.upload import push

    named = header.base.name not in offline.names("model")
    if header.base.name and not named:
        print(f"note: {header.base.name} is no name on the hub: the card names no base model")
    done = push(
        config.directory,
        publication(header.path, header.provenance, config.repository),
        private=config.private,
        revision=config.revision,
        base=named,
    )
    print(f"{config.directory} is {done}")
    return 0


def publication(folder: Path, origin: Provenance, repository: str) -> Publication:
    """The scores in the results beside the module, and the task of its training run."""
    found = (
        read_json(folder / ALL, folder) if is_file(folder / ALL) else origin.training.get("scores")
    )
    scores = {
        name.removeprefix(MEASURED): float(value)
        for name, value in (found or {}).items()
        if name.startswith(MEASURED) and not name.endswith(ASIDE) and type(value) in (int, float)
    }
    known = TASKS.get(str(origin.task))
    return Publication(repository, origin.task, known.hub if known else None, scores)
