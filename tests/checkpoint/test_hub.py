"""Modules by hub name: the hub's own client against a server on 127.0.0.1 (tests/hub_server.py).

The client reads its settings when it is imported, so that every test runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, files_of, serve
from hypothesis import given
from hypothesis import strategies as st
from modules import lora

from pem_composition.checkpoint import hub_name
from pem_composition.checkpoint.hub_name import Reference
from pem_composition.errors import CheckpointError

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = """
import contextlib, io, json, sys
from pem_composition.cli import main
for argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    paths = (tmp_path / "made" / "a", tmp_path / "made" / "b")
    for seed, path in enumerate(paths):
        lora(seed).save(path)
    return paths


def pem(
    hub: Hub, here: Path, *programs: list[str], cache: str = "cache", **variables: str
) -> list[tuple[int, str, str]]:
    """Code, output and error of each program, all of them in one process in ``here``."""
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(programs),
        env=os.environ | environment | hub.environment(here / cache, **variables),
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def facts(found: tuple[int, str, str]) -> Any:
    """What ``pem inspect --json`` says of one module."""
    code, out, err = found
    assert code == 0, err
    return json.loads(out)


# --- names --------------------------------------------------------------------------------------

words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,5}", fullmatch=True)
references = st.builds(
    Reference,
    st.builds("{}/{}".format, words, words),
    st.none() | words | st.just("refs/pr/7"),
    st.lists(words, max_size=3).map("/".join),
)


@given(references)
def test_a_name_means_what_it_says(reference):
    assert hub_name.parse(str(reference)) == reference
    assert hub_name.parse(str(reference).removeprefix("hf://")) == reference
    assert hub_name.parse(str(Path(str(reference)))) == reference  # one slash fewer


@given(references)
def test_the_revision_may_stand_last(reference):
    bare = Reference(reference.repository, None, reference.subfolder)
    revision = f"@{reference.revision}" if reference.revision else ""
    assert hub_name.parse(f"{bare}{revision}") == reference


@pytest.mark.parametrize("text", ["runs", "./a/b", "../a/b", "/a/b", "~/a/b", "a/../b", "a/b/", ""])
def test_paths_are_no_names(text):
    assert hub_name.parse(text) is None


@pytest.mark.parametrize("text", ["hf://a", "hf://a/b@", "hf://a/b@x/c@y", "hf://a/../b", "hf:a/b"])
def test_a_name_that_is_none_is_refused(text):
    with pytest.raises(CheckpointError, match="not the name of a module on the hub") as error:
        hub_name.parse(text)
    assert str(error.value).startswith(f"{text}:")


def test_a_mistyped_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name.reference("runs/a") == Reference("runs/a")
    (tmp_path / "runs").mkdir()
    assert hub_name.reference("runs/a") is None
    assert hub_name.reference("hf://runs/a") == Reference("runs/a")


# --- reading ------------------------------------------------------------------------------------


def test_by_name_revision_and_subfolder_and_again_without_the_hub(hub, folders, tmp_path):
    a, b = folders
    first = hub.put("org/name", a)
    hub.put("org/name", b)
    hub.put("org/many", {f"deep/er/{n}": d for n, d in files_of(a).items()})
    names = {
        "org/name": b, f"org/name@{first}": a, "hf://org/name@main": b,
        "org/many/deep/er": a, "hf://org/many@main/deep/er": a, "org/many/deep/er@main": a,
    }  # fmt: skip
    asked = [["inspect", name, "--json", "--values"] for name in (*names, *map(str, folders))]
    online = [facts(found) for found in pem(hub, tmp_path, *asked)]
    local = dict(zip(map(str, folders), online[-2:], strict=True))
    for told, folder in zip(online, names.values(), strict=False):
        assert {**told, "path": ""} == {**local[str(folder)], "path": ""}
    served = len(hub.asked)
    offline = pem(hub, tmp_path, *asked, HF_HUB_OFFLINE="1")
    assert [facts(found) for found in offline] == online
    assert len(hub.asked) == served


def test_only_the_files_of_a_module_are_fetched(hub, folders, tmp_path):
    more = {"training.log": b"x", "optimizer.pt": b"x", "other/adapter_config.json": b"{}"}
    hub.put("org/name", files_of(folders[0]) | more)
    (found,) = pem(hub, tmp_path, ["inspect", "org/name"])
    assert found[0] == 0
    fetched = {a.rpartition("resolve/")[2].partition("/")[2] for a in hub.asked if "resolve" in a}
    assert fetched == files_of(folders[0]).keys()


def test_a_sum_names_the_commits_and_is_rebuilt_from_them(hub, folders, tmp_path):
    a, b = folders
    commits = (
        hub.put("org/a", a),
        hub.put("org/many", {f"b/{n}": d for n, d in files_of(b).items()}),
    )
    local, remote = ["compose", "0.3*a - b"], ["compose", "0.3*a - b"]
    for name, path, online in (("a", a, "org/a"), ("b", b, "hf://org/many/b")):
        local += ["--module", f"{name}={path}"]
        remote += ["--module", f"{name}={online}"]
    for found in pem(hub, tmp_path, [*local, "-p", "local"], [*remote, "-p", "remote"]):
        assert found[0] == 0, found
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "local" / file).read_bytes() == (tmp_path / "remote" / file).read_bytes()
    record = json.loads((tmp_path / "remote" / "pem.json").read_text())
    assert [s["path"] for s in record["sources"]] == [
        f"hf://org/a@{commits[0]}", f"hf://org/many@{commits[1]}/b"
    ]  # fmt: skip
    hub.put("org/a", b)  # the branch goes on, the sum stays what it was
    (found,) = pem(hub, tmp_path, ["rebuild", "remote"], cache="another")
    assert found[0] == 0 and "equal, bit for bit" in found[1]
    (lost,) = pem(hub, tmp_path, ["rebuild", "remote"], cache="empty", HF_HUB_OFFLINE="1")
    assert lost[0] == 2 and f"hf://org/a@{commits[0]}: not wholly in the hub's cache" in lost[2]


def test_results_depend_on_the_commit(hub, folders, tmp_path):
    code = "from pem_composition.evaluation.keys import module_digest as d; print(d('org/a'))"
    found = []
    for folder in (*folders, folders[0]):
        hub.put("org/a", folder)
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | hub.environment(tmp_path / "c")
        command = [sys.executable, "-c", code]
        found.append(subprocess.run(command, env=environment, capture_output=True, check=True))
    digests = [done.stdout for done in found]
    assert digests[0] == digests[2] != digests[1]


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, tmp_path):
    lora(0, r=8, size=(200_000, 7)).save(tmp_path / "large")  # the client keeps parts of 10 MB
    hub.put("org/a", tmp_path / "large")
    size = (tmp_path / "large" / "adapter_model.safetensors").stat().st_size
    hub.cut = [15_000_000]
    (found,) = pem(hub, tmp_path, ["check", "org/a", "--values", "--json"])
    assert found[0] == 0, found  # the recorded sha256 among its checks
    assert len(hub.sent) == 2 and hub.sent[0] == 15_000_000
    assert size - 15_000_000 <= hub.sent[1] < size


def test_a_folder_wins_and_that_is_said(hub, folders, tmp_path):
    hub.put("made/a", folders[1])
    inspect = ["inspect", "made/a", "--json"]
    remote = facts(pem(hub, tmp_path, ["inspect", "hf://made/a", "--json"])[0])
    local = pem(hub, tmp_path, inspect, inspect)
    assert facts(local[0])["sha256"] != remote["sha256"]
    note = "note: made/a is the folder here; hf://made/a is on the hub\n"
    assert [found[2] for found in local] == [note, ""]  # once per process


def test_what_cannot_be_read_is_refused_in_one_line(hub, folders, tmp_path):
    files = files_of(folders[0])
    hub.put("org/a", folders[0])
    hub.put("org/gated", folders[0], gated=True)
    hub.put("org/private", folders[0], private=True)
    hub.put("org/model", {"config.json": b"{}", "model.safetensors": b""})
    hub.put("org/rows", {"train.csv": b"a"}, kind="datasets")
    hub.put("org/empty", {"notes.txt": b""})
    hub.put("org/many", {f"x/{n}": d for n, d in files.items()})
    hub.put("org/half", {n: d for n, d in files.items() if n != "adapter_model.safetensors"})
    expected = {
        "org/none": "org/none: no such directory, and no such module on the hub, or a private one",
        "hf://org/none": "hf://org/none: no such module on the hub, or a private one; check the",
        "org/private": "or a private one; check the name, or set HF_TOKEN",
        "org/gated": "org/gated: the module is gated; expected a token of a user who was given",
        "org/a@v9": "no revision 'v9' of it on the hub; found main, expected a branch, a tag or",
        "org/a/x": "org/a/x: no module at this place; found modules elsewhere in org/a; name one "
        "of them: hf://org/a",
        "org/many": "name one of them: hf://org/many/x",
        "org/model": "org/model: a whole model; expected a module with adapter_config.json; give",
        "org/rows": "org/rows: a data set on the hub; expected a module; name a module",
        "org/empty": "no module in the repository; found notes.txt, expected adapter_config.json",
        "org/half": "no weights; found README.md, adapter_config.json, pem.json, expected",
    }
    asked = [["inspect", name] for name in expected]
    for said, (code, out, err) in zip(expected.values(), pem(hub, tmp_path, *asked), strict=True):
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    granted = [["inspect", "org/gated"], ["inspect", "org/private"]]
    for token, code in (("hf_right", 0), ("hf_wrong", 2)):
        found = pem(hub, tmp_path, *granted, cache=token, HF_TOKEN=token)
        assert [f[0] for f in found] == [code, code]


def test_without_the_hub_the_cache_answers_or_the_error_says_so(hub, folders, tmp_path):
    hub.put("org/a", folders[0])
    inspect = ["inspect", "hf://org/a"]
    (offline,) = pem(hub, tmp_path, inspect, HF_HUB_OFFLINE="1")
    assert offline[0] == 2 and "not wholly in the hub's cache, and the hub is out" in offline[2]
    hub.broken = 503
    (failed,) = pem(hub, tmp_path, inspect)
    assert failed[0] == 3 and "hf://org/a: the hub answers with 503; try again" in failed[2]
    hub.broken = None
    (known,) = pem(hub, tmp_path, inspect)
    hub.broken = 503
    assert pem(hub, tmp_path, inspect) == [known] and known[0] == 0


def test_folders_are_read_without_the_client(folders):
    code = (
        "import sys, pem_composition as pem\n"
        f"from pem_composition.checkpoint import inspect_header\n"
        f"inspect_header({str(folders[0])!r}); pem.load({str(folders[1])!r})\n"
        "print('huggingface_hub' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
