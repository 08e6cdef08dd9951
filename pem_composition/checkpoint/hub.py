"""The folder behind a module's name: a path, or a hub name whose module is fetched."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from pem_composition.checkpoint.hub_name import reference
from pem_composition.errors import MissingPackage, install, installed
from pem_composition.safe_files import as_path


def folder_of(path: str | PathLike[str]) -> Path:
    """The folder that a path or a hub name stands for; a module that is not there is fetched.

    A name is looked up once per process, so that every step of a run reads the same commit.

    Raises:
        CheckpointError: no such module or revision, no access, or no adapter there.
        RunFailed: the download broke off, or the hub has failed.
    """
    place = as_path(path, "the folder or the hub name of a module")
    named = reference(path)
    if named is None:
        return place
    if not installed("huggingface_hub"):
        raise MissingPackage.build(
            str(named), "needs the package huggingface_hub", do=install("huggingface_hub")
        )
    from pem_composition.checkpoint.download import fetch

    return fetch(named, fspath(path))
