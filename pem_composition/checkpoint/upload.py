"""Put a module on the hub with the hub's own client: its files and its card, in one commit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from pem_composition.checkpoint import download, hub_name, provenance
from pem_composition.checkpoint.card import Publication, card
from pem_composition.checkpoint.content import (
    CARD,
    CONFIG,
    FULL,
    HEAD_CONFIG,
    HEADS,
    MODULE_FILES,
    RECORD,
)
from pem_composition.checkpoint.hub_name import Reference
from pem_composition.checkpoint.machine_paths import without_paths
from pem_composition.checkpoint.store import load, locate
from pem_composition.errors import CheckpointError, PEMError, RunFailed, UsageError
from pem_composition.record import TO_SUBTRACT, Provenance, purposes
from pem_composition.safe_files import json_bytes, open_regular, read_json

BASE_KEYS = ("base_model_name_or_path", "model_name")  # of PEFT, of adapter-transformers
OWN_CARD = re.compile(rb"pem[-_]composition")  # a tag that every card of this library has


def push(
    directory: str | PathLike[str],
    publication: Publication,
    *,
    private: bool = False,
    revision: str | None = None,
    base: bool = True,
) -> Reference:
    """Upload a module; returns its name on the hub with the commit.

    No path of this machine goes up: record, configuration and card have its last name.
    The repository and the branch are made where they are missing. A README.md that this library did
    not write goes up as it is.

    Args:
        private: of a repository that is made.
        revision: the branch; default: main.
        base: False where the base's name is none on the hub, to leave it out of the card.

    Raises:
        CheckpointError: no sound module; one that exists to be subtracted; no right to write there.
        UsageError: not the name of a repository.
        RunFailed: the hub is out of reach, or has failed.
    """
    name = publication.repository
    if hub_name.parse(name) != Reference(name):
        raise UsageError.build(
            name, "not the name of a repository", expected="org/name", do="correct it"
        )
    folder, layout = locate(directory)
    if layout == FULL:
        raise CheckpointError.build(
            folder, "a whole model", expected="a module", do=f"use hf upload {name} {folder}"
        )
    module = load(folder)
    content = {file: _content(folder, file) for file in _files(folder, module.heads)}
    content |= _public(folder, content)
    if RECORD in content:
        record = provenance.parse(json.loads(content[RECORD]))
        check_purpose(record.provenance, folder)
        module = replace(module, provenance=record.provenance)
    if not base:
        module = replace(module, base=replace(module.base, name=None))
    if CARD not in content or OWN_CARD.search(content[CARD]):
        text = card(module, name.partition("/")[2], layout=layout, publication=publication)
        content[CARD] = text.encode()
    target = Reference(name, revision)
    try:
        with download.client():
            commit = _commit(target, content, private=private, message=f"Add {module}")
    except (OSError, download.TRANSPORT) as error:
        raise _refused(target, error) from error
    download.fetch.cache_clear()  # the name means another commit now
    return Reference(name, commit)


def check_purpose(origin: Provenance, where: object) -> None:
    """Refuse a module that shows what to remove, and a sum that adds one.

    A negation, and a sum that takes such a module off, may be published.

    Raises:
        CheckpointError: naming the purpose.
    """
    for name, purpose in purposes(origin.notes).items():
        word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])")
        uses = [t for t in origin.terms if word.search(t.label)]
        negation = re.compile(rf"negate\({re.escape(name)}(, \d[\d.e-]*)?\)")
        removed = bool(uses) and all(
            (t.label == name and t.coefficient <= 0)
            or (negation.fullmatch(t.label) and t.coefficient >= 0)
            for t in uses
        )
        if TO_SUBTRACT in purpose and not removed:
            raise CheckpointError.build(
                where, f"{name} {TO_SUBTRACT} from a model: it is not published",
                found=f"purpose: {purpose}", do="publish what it was subtracted from",
            )  # fmt: skip


def _public(folder: Path, content: Mapping[str, bytes]) -> dict[str, bytes]:
    """Record and configuration with names in place of paths, and the checksum of what goes up."""
    public = {}
    for name in content.keys() & {CONFIG, HEAD_CONFIG}:
        config = read_json(folder / name, folder)
        named = config | {k: without_paths(config[k]) for k in BASE_KEYS if k in config}
        if named != config:
            public[name] = json_bytes(named)
    if RECORD in content:
        raw = without_paths(read_json(folder / RECORD, folder))
        for name, data in public.items():
            raw["files"][name] = hashlib.sha256(data).hexdigest()
        public[RECORD] = json_bytes(raw)
    return public


def _files(folder: Path, named: Iterable[str]) -> Iterator[str]:
    """The files of a module that are there; of heads, those that its record names."""
    beside = (f"{HEADS}/{name}.safetensors" for name in named)
    yield from (n for n in (*sorted(MODULE_FILES), *beside) if (folder / n).is_file())


def _content(folder: Path, name: str) -> bytes:
    with open_regular(folder / name, folder) as file:
        return file.read()


def _commit(target: Reference, content: dict[str, bytes], *, private: bool, message: str) -> str:
    """Write the files in one commit; returns its id.

    Files of the module that was there before and that this one lacks are deleted.
    """
    api = HfApi()
    api.create_repo(target.repository, private=private or None, exist_ok=True)
    if target.revision:
        api.create_branch(target.repository, branch=target.revision, exist_ok=True)
    there = api.list_repo_files(target.repository, revision=target.revision)
    beside = f"{HEADS}/"
    old = [n for n in there if n in MODULE_FILES or n.startswith(beside)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, data) for name, data in sorted(content.items())),
        *(CommitOperationDelete(name) for name in sorted({*old} - {*content})),
    ]
    done = api.create_commit(
        target.repository, operations, commit_message=message[:200], revision=target.revision
    )
    return str(done.oid)


def _refused(target: Reference, error: Exception) -> PEMError:
    """The client's error as one line, where it differs from that of a download."""
    denied = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
    if denied or isinstance(error, RepositoryNotFoundError):
        return CheckpointError.build(
            str(target), "the hub refuses to write there", expected="a token with the right to",
            do="set HF_TOKEN to one that may write (or run: hf auth login)",
        )  # fmt: skip
    if isinstance(error, OfflineModeIsEnabled):
        return RunFailed.build(
            str(target), "the hub is out of reach",
            do="unset HF_HUB_OFFLINE or connect to the network",
        )  # fmt: skip
    if isinstance(error, download.TRANSPORT) and not isinstance(error, HfHubHTTPError):
        return RunFailed.build(
            str(target), f"the upload broke off ({type(error).__name__})", do="run it again"
        )
    return download.explained(target, str(target), error)
