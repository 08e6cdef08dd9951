"""Fetch a module from the hub with the hub's own client; every failure is one line.

Only the files of a module are fetched: adapter, heads, pem.json and card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from logging import ERROR
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from pem_composition import network
from pem_composition.checkpoint.content import CONFIG, HEADS, MODEL_CONFIG, MODULE_FILES
from pem_composition.checkpoint.files import meant
from pem_composition.checkpoint.hub_name import Reference
from pem_composition.errors import CheckpointError, PEMError, RunFailed
from pem_composition.safe_files import is_file

FILES = (*sorted(MODULE_FILES), f"{HEADS}/*.safetensors")
LOGIN = "set HF_TOKEN to a token that may read it (or run: hf auth login)"
# The error class of the HTTP library beneath the client, whichever that is.
TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]


@cache
def fetch(wanted: Reference, given: str) -> Path:
    """The folder in the hub's cache that holds the module; what is missing there is downloaded.

    Args:
        given: the name as the user wrote it, for errors.

    Raises:
        CheckpointError: no such module or revision, no access, no adapter there, or neither the
            hub nor a copy in the cache.
        RunFailed: the download broke off, or the hub has failed.
    """
    where = wanted.subfolder and f"{wanted.subfolder}/"
    try:
        with client():
            root = snapshot_download(
                wanted.repository,
                revision=wanted.revision,
                allow_patterns=[f"{where}{name}" for name in FILES],
            )
            folder = Path(root, wanted.subfolder)
            if not is_file(folder / CONFIG):
                raise _no_adapter(wanted, given, Path(root).name)
    except (OSError, TRANSPORT) as error:
        raise explained(wanted, given, error) from error
    except ValueError as error:  # the client refuses a name, such as one with ..
        raise CheckpointError.build(
            given, f"a file's name is not taken from the hub ({error})", do="name another module"
        ) from None
    return folder


@contextmanager
def client() -> Iterator[None]:
    """Within, the hub's client says nothing, and asks the hub only where there is a network."""
    verbosity, silent = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity(ERROR)
    disable_progress_bars()
    try:
        with network.session():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if not silent:
            enable_progress_bars()


def explained(wanted: Reference, name: str, error: Exception) -> PEMError:
    """The client's error as one line with its remedy; ``name`` is the reference as it was given."""
    cause = error
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        cause = error.__cause__  # the hub has answered, and nothing is in the cache
    if isinstance(cause, GatedRepoError):
        return CheckpointError.build(
            name, "the module is gated", expected="a token of a user who was given access",
            do=f"ask for access on its page, then {LOGIN}",
        )  # fmt: skip
    if isinstance(cause, RepositoryNotFoundError):
        return _not_found(wanted, name)
    if isinstance(cause, RevisionNotFoundError):
        return CheckpointError.build(
            name, f"no revision {wanted.revision!r} of it on the hub", found=_revisions(wanted),
            expected="a branch, a tag or a whole commit", do="correct what stands behind the @",
        )  # fmt: skip
    if isinstance(cause, HfHubHTTPError):
        code = cause.response.status_code
        if code in (401, 403):
            return CheckpointError.build(name, f"the hub refuses access ({code})", do=LOGIN)
        return RunFailed.build(name, f"the hub answers with {code}", do="try again later")
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return CheckpointError.build(
            name, f"{_no_folder(name)}not wholly in the hub's cache, and the hub is out of reach",
            do=_folder_meant(name)
            + "unset HF_HUB_OFFLINE or connect to the network, or give a local folder",
        )  # fmt: skip
    if isinstance(error, OSError) and error.errno is not None:
        return RunFailed.build(name, f"cannot be kept ({error.strerror})", do="see HF_HOME")
    return RunFailed.build(
        name, f"the download broke off ({type(error).__name__})",
        do="run it again: it goes on where it stopped",
    )  # fmt: skip


def _no_folder(name: str) -> str:
    """What is said first of a name that could have been a folder's."""
    return "" if name.startswith("hf:") else "no such directory, and "


def _folder_meant(name: str) -> str:
    """``did you mean X? else``, where the name is a slip of the pen for a module's folder here."""
    found = "" if name.startswith("hf:") else meant(Path(name))
    return f"{found} else " if found else ""


def _not_found(wanted: Reference, name: str) -> PEMError:
    """What is under that name: nothing, something private, or a data set."""
    with client():
        try:
            data = HfApi().repo_exists(wanted.repository, repo_type="dataset")
        except (OSError, TRANSPORT):
            data = False
    if data:
        return CheckpointError.build(
            name, "a data set on the hub", expected="a module",
            do="name a module; rows come from files (--train_file, --validation_file)",
        )  # fmt: skip
    return CheckpointError.build(
        name, f"{_no_folder(name)}no such module on the hub, or a private one",
        do=f"{_folder_meant(name)}check the name, or {LOGIN}",
    )  # fmt: skip


def _revisions(wanted: Reference) -> str | None:
    """Branches and tags, as far as the hub tells."""
    try:
        refs = HfApi().list_repo_refs(wanted.repository)
    except (OSError, TRANSPORT):
        return None
    return ", ".join(ref.name for ref in (*refs.branches, *refs.tags)) or None


def _no_adapter(wanted: Reference, name: str, commit: str) -> PEMError:
    """Say what the repository holds instead of an adapter at this place."""
    try:
        files = [Path(n) for n in HfApi().list_repo_files(wanted.repository, revision=commit)]
    except (OSError, TRANSPORT):
        files = []
    places = sorted(f.parent.as_posix().removeprefix(".") for f in files if f.name == CONFIG)
    if places:
        found = [str(Reference(wanted.repository, wanted.revision, place)) for place in places]
        return CheckpointError.build(
            name, "no module at this place", found=f"modules elsewhere in {wanted.repository}",
            do=f"name one of them: {', '.join(found)}",
        )  # fmt: skip
    if Path(wanted.subfolder, MODEL_CONFIG) in files:
        return CheckpointError.build(
            name, "a whole model", expected=f"a module with {CONFIG}",
            do=f"give it as the base model, or its folder (hf download {wanted.repository})",
        )  # fmt: skip
    return CheckpointError.build(
        name, "no module in the repository", expected=f"{CONFIG} and its weights",
        found=", ".join(sorted(f.as_posix() for f in files)[:12]) or "no files",
        do="name a repository with an adapter",
    )  # fmt: skip
