"""Safe file work: bounded reads, strict JSON, the safetensors header, whole directories."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.examples import examples

from pem_composition import safe_files
from pem_composition.checkpoint import files, save
from pem_composition.checkpoint.tensors import open_tensors, read_raw, write_tensors
from pem_composition.config import BaseIdentity, IA3Config
from pem_composition.errors import CheckpointError
from pem_composition.module import PEM


def raw_safetensors(
    path: Path, header: object, body: bytes = b"", length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(
    dtype: str = "F32", shape: tuple[int, ...] = (2,), span: tuple[int, int] = (0, 8)
) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


DAMAGED = {
    "overlap": ({"a": entry(), "b": entry(span=(4, 12))}, 12, "offset"),
    "hole": ({"a": entry(), "b": entry(span=(12, 20))}, 20, "offset"),
    "trailing bytes": ({"a": entry()}, 9, "cover the file exactly"),
    "truncated": ({"a": entry()}, 7, "cover the file exactly"),
    "unknown dtype": ({"a": entry("Q7")}, 8, "unknown dtype"),
    "size mismatch": ({"a": entry(shape=(3,))}, 8, "do not fit its shape"),
    "negative offset": ({"a": entry(span=(-8, 0))}, 8, "whole numbers"),
    "bool in shape": ({"a": {**entry(), "shape": [True, 2]}}, 8, "whole numbers"),
    "metadata": ({"__metadata__": {"x": 1}, "a": entry()}, 8, "__metadata__"),
    "not an object": ([1], 0, "JSON object"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused_and_the_file_is_named(tmp_path: Path, case: str) -> None:
    header, size, words = DAMAGED[case]
    path = raw_safetensors(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=words) as error:
        files.SafetensorsFile(path)
    assert str(path) in str(error.value)
    assert "expected" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short"),
        (struct.pack("<Q", 2**63), "too large"),
        (struct.pack("<Q", 99_000), "cut off"),
        (struct.pack("<Q", 3) + b"\xff\xfe\xfd", "UTF-8"),
        (struct.pack("<Q", 3) + b"{a}", "JSON"),
        (struct.pack("<Q", 23) + b'{"a": 1, "a": 2, "c":1}', "'a' appears twice"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "nested too deeply|JSON"),
    ],
)
def test_bytes_that_are_no_header(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        files.SafetensorsFile(path)


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_TENSORS", 100)
    header = {f"t{i}": entry(shape=(0,), span=(0, 0)) for i in range(101)}
    with pytest.raises(CheckpointError, match="too many tensors"):
        files.SafetensorsFile(raw_safetensors(tmp_path / "x.safetensors", header))
    del header["t0"]
    files.SafetensorsFile(raw_safetensors(tmp_path / "x.safetensors", header))


def test_our_writer_and_the_library_agree(tmp_path: Path) -> None:
    tensors = {
        "z": torch.randn(3, 2),
        "half": torch.randn(5).half(),
        "b": torch.randn(4, 1).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "count": torch.arange(3),
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(ours, tensors)
    save_file(tensors, theirs)
    assert files.SafetensorsFile(ours).infos == files.SafetensorsFile(theirs).infos
    with safe_open(ours, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_a_file_in_memory_gives_its_own_bytes_whatever_the_header_aligns(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(5, dtype=torch.float64)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for padding in range(9):  # a header of any length is valid
        header = data[8 : 8 + length].rstrip() + b" " * padding
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        with open_tensors(path) as file:
            file.hold()
            for name, tensor in tensors.items():
                assert torch.equal(read_raw(file, name), tensor)
                assert read_raw(file, name).data_ptr() % tensor.element_size() == 0
            assert file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@examples(200)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_never_reads_more_than_the_library_accepts(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    write_tensors(path, {"a": torch.ones(4), "b": torch.ones(2, 3)})
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        ours = files.SafetensorsFile(path).infos
    except CheckpointError:
        return
    try:
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(ours)
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "out of range"),
        ("[1]", "a JSON list"),
        ('{"a": ', "not valid JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=words) as error:
        safe_files.read_json(path)
    assert str(path) in str(error.value)


def test_fifo_directory_and_missing_file_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    # Opened as a file is, the FIFO would wait for a writer until the test times out.
    for name, words in (("fifo", "a FIFO"), ("folder", "a directory"), ("absent", "no such file")):
        with pytest.raises(CheckpointError, match=words):
            safe_files.open_regular(tmp_path / name)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_followed(tmp_path: Path) -> None:
    root = tmp_path / "module"
    root.mkdir()
    (tmp_path / "secret.json").write_text('{"a": 1}')
    (root / "real.json").write_text('{"a": 2}')
    (root / "out.json").symlink_to(tmp_path / "secret.json")
    (root / "in.json").symlink_to("real.json")
    assert safe_files.read_json(root / "in.json", root) == {"a": 2}
    with pytest.raises(CheckpointError, match="leads out of its folder") as error:
        safe_files.read_json(root / "out.json", root)
    assert "secret.json" in str(error.value)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text('{"a": 3}')
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert safe_files.read_json(snapshot / "config.json", snapshot) == {"a": 3}


def test_a_file_that_is_replaced_leaves_its_mode(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        safe_files.write_text(tmp_path / "scores.csv", "a")
        assert stat.S_IMODE((tmp_path / "scores.csv").stat().st_mode) == 0o640
        (tmp_path / "scores.csv").chmod(0o664)
        safe_files.write_text(tmp_path / "scores.csv", "b")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "scores.csv").stat().st_mode) == 0o664
    assert listing(tmp_path) == ["scores.csv"]


# --- atomic_directory ---------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_directory_appears_with_the_modes_the_umask_asks_for(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with safe_files.atomic_directory(tmp_path / "deep" / "out") as folder:
            (folder / "a").write_text("x")
            (folder / "a").chmod(0o600)
            assert not (tmp_path / "deep" / "out").exists()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "deep" / "out" / "a").stat().st_mode) == 0o640
    assert listing(tmp_path / "deep") == ["out"]


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        safe_files.atomic_directory(tmp_path / "new" / "out") as folder,
    ):
        (folder / "a").write_text("x")
        raise RuntimeError
    assert listing(tmp_path) == []
    with safe_files.atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("old")
    with (
        pytest.raises(RuntimeError),
        safe_files.atomic_directory(tmp_path / "out", overwrite=True) as folder,
    ):
        (folder / "a").write_text("new")
        raise RuntimeError
    assert listing(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_existing_output_needs_overwrite_and_foreign_files_survive_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    (out / "log.txt").write_text("log")
    with pytest.raises(CheckpointError, match="--overwrite"), safe_files.atomic_directory(out):
        pytest.fail("must not be entered")
    keep = lambda name: name != "a" and name != "b"  # noqa: E731
    with safe_files.atomic_directory(out, overwrite=True, keep=keep) as folder:
        (folder / "c").write_text("new")
    assert listing(out) == ["c", "log.txt"]
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("kept", [False, True])
def test_what_was_replaced_goes_although_another_process_has_put_the_new_output_aside(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two names of the new output and the end, which is where it was left behind. What
    is to be kept has no place then, and is not removed."""
    out, elsewhere, rename = tmp_path / "out", tmp_path / "elsewhere", Path.rename
    out.mkdir()
    (out / "log.txt").write_text("log")

    def renamed(self: Path, target: Path) -> None:
        rename(self, target)
        if ".tmp-" in self.name:
            rename(target, elsewhere)

    monkeypatch.setattr(Path, "rename", renamed)
    keep = (lambda name: name == "log.txt") if kept else None
    with safe_files.atomic_directory(out, overwrite=True, keep=keep) as folder:
        (folder / "a").write_text("new")
    assert listing(elsewhere) == ["a"]
    left = [path for path in tmp_path.iterdir() if path != elsewhere]
    assert [listing(path) for path in left] == ([["log.txt"]] if kept else [])


def test_a_file_or_the_working_directory_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    work = tmp_path / "work" / "inner"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    for path, words in (
        (tmp_path / "file", "a file"),
        (Path(), "not a name"),
        (Path(".."), "not a name"),
        (tmp_path / "work", "working or home"),
        (tmp_path / "file" / "out", "cannot be created|not a directory"),
    ):
        with pytest.raises(CheckpointError, match=words), safe_files.atomic_directory(path, True):
            pytest.fail("must not be entered")
    assert listing(tmp_path) == ["file", "work"]


def test_leftovers_of_dead_processes_are_cleaned_and_a_directory_put_aside_comes_back(
    tmp_path: Path,
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mark = f"{dead.pid}-{safe_files._host()}0000"
    (tmp_path / f".out.tmp-{mark}").mkdir()
    aside = tmp_path / f".out.old-{mark}"
    aside.mkdir()
    (aside / "a").write_text("old")
    alive = tmp_path / f".out.tmp-{os.getpid()}-{safe_files._host()}0000"
    alive.mkdir()
    with (
        pytest.raises(CheckpointError, match="--overwrite"),
        safe_files.atomic_directory(tmp_path / "out"),
    ):
        pytest.fail("must not be entered")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert listing(tmp_path) == sorted([alive.name, "out"])


def test_a_file_that_a_dead_process_left_half_written_goes_with_the_next_one(
    tmp_path: Path,
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getpid()):
        (tmp_path / f".table.md.partial-{process}-{safe_files._host()}0000").touch()
    safe_files.write_text(tmp_path / "table.md", "new")
    alive = f".table.md.partial-{os.getpid()}-{safe_files._host()}0000"
    assert listing(tmp_path) == sorted([alive, "table.md"])


def test_a_link_goes_on_to_lead_to_the_file_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_text("old")
    (tmp_path / "link").symlink_to("store/file")
    safe_files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == "new"
    assert listing(tmp_path / "store") == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 kB, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def module(size: int) -> PEM:
    names = [f"roberta.encoder.layer.0.attention.self.{p}.ia3" for p in ("key", "value")]
    tensors = {n: torch.rand(size) for n in names}
    return PEM(tensors, IA3Config(("key", "value")), BaseIdentity(model_type="roberta"))


@pytest.mark.parametrize("layout", ["peft", "adapter-transformers"])
def test_a_full_disk_is_an_oserror_and_leaves_the_old_output(small_disk: Path, layout: str) -> None:
    module(8).save(small_disk / "out", format=layout)
    before = {p.name: p.read_bytes() for p in (small_disk / "out").iterdir()}
    with pytest.raises(OSError, match="No space left") as error:
        module(30_000).save(small_disk / "out", format=layout, overwrite=True)
    assert error.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in (small_disk / "out").iterdir()} == before
    assert listing(small_disk) == ["out"]


def test_a_file_that_a_full_disk_has_no_space_for_is_named(small_disk: Path) -> None:
    (small_disk / "rows").write_text("old")
    with pytest.raises(OSError, match="No space left") as error:
        safe_files.write_bytes(small_disk / "rows", bytes(200_000))
    assert error.value.filename == str(small_disk / "rows")
    assert listing(small_disk) == ["rows"] and (small_disk / "rows").read_text() == "old"


KILLED = """
import os, random, signal, sys, time, torch
from contextlib import suppress
from pathlib import Path
from pem_composition.config import LoraConfig
from pem_composition.module import PEM
t = {}
for i in range(4):
    t[f"m.layers.{i}.q.lora_A"] = torch.randn(8, 2048)
    t[f"m.layers.{i}.q.lora_B"] = torch.randn(2048, 8)
pem = PEM(t, LoraConfig(8, 8.0, ("q",)))
pem.save(Path(sys.argv[1]) / "warm")
began = time.perf_counter()
pem.save(Path(sys.argv[1]) / "warm", overwrite=True)
longest = max(0.08, 4 * (time.perf_counter() - began))  # a busy machine saves slowly
random.seed(0)
for n in range(50):
    child = os.fork()
    if child == 0:
        for i in range(1000):
            pem.save(Path(sys.argv[1]) / f"out{n}-{i}")
    time.sleep(random.uniform(0.005, longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_files_beside_a_module_appear_with_it_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(module(3), out, beside={"learned.json": b"1"})
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert before["learned.json"] == b"1"
    assert "learned.json" not in json.loads(before["pem.json"])["files"]
    with pytest.raises(OSError, match="no"):
        save(module(4), out, overwrite=True, beside={"learned.json": b"2", "no/such": b"3"})
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    save(module(4), out, overwrite=True, beside={"learned.json": b"2"})
    assert (out / "learned.json").read_bytes() == b"2"


@pytest.mark.slow
def test_kill_9_at_50_random_moments_of_saving_leaves_complete_modules_only(tmp_path: Path) -> None:
    from pem_composition.checkpoint import load

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, env=environment)
    outputs = list(tmp_path.glob("out*"))
    cut_off = list(tmp_path.glob(".out*.tmp-*"))
    assert outputs, "no save was finished"
    assert cut_off, "no save was interrupted"
    for out in outputs:
        assert len(load(out).tensors) == 8
    again = cut_off[0].name.removeprefix(".").partition(".")[0]
    with safe_files.atomic_directory(tmp_path / again, overwrite=True):
        assert not cut_off[0].exists()


@pytest.mark.parametrize(("letter", "count"), [("a", 250), ("é", 120), ("模", 80)])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path, letter: str, count: int):
    names = [letter * count, letter * (count - 1) + "b"]
    for content in ("one", "two"):
        for name in names:
            with safe_files.atomic_directory(tmp_path / name, overwrite=True) as folder:
                (folder / "x").write_text(content + name[-1])
    assert listing(tmp_path) == sorted(names)
    assert [(tmp_path / n / "x").read_text() for n in names] == ["two" + n[-1] for n in names]
    for name in names:
        safe_files.write_text(tmp_path / names[0] / name, "three")
    assert listing(tmp_path / names[0]) == sorted([*names, "x"])


def test_a_directory_that_others_rename_away_and_back_is_never_taken_for_a_file(tmp_path: Path):
    """A forked writer replaces it again and again; asking whether it may be replaced is safe."""
    out, aside = tmp_path / "out", tmp_path / "aside"
    out.mkdir()
    (out / "x").touch()
    writer = os.fork()
    if writer == 0:
        while True:
            out.rename(aside)
            aside.rename(out)
    try:
        for _ in range(5_000):
            safe_files.check_free(out, overwrite=True)
            assert not safe_files.is_file(out)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


def test_a_proposal_opens_few_folders_and_none_is_made_where_nothing_can_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every folder beside was opened, and those in it: seconds where a sweep has thousands."""
    for i in range(200):
        (tmp_path / f"run{i:03}" / "checkpoint-1").mkdir(parents=True)
    ours = tmp_path / "runs" / "ours"
    ours.mkdir(parents=True)
    (ours / "adapter_config.json").write_text("{}")
    opened, looked = [], files._holds_module
    monkeypatch.setattr(files, "_holds_module", lambda f: opened.append(f) or looked(f))
    assert files.meant(tmp_path / "rums" / "ours") == f"did you mean {ours}?"
    assert 0 < len(opened) <= 2 * files.MAX_PROPOSALS
    unlistable = (ours / "adapter_config.json" / "x", Path("x" * 300), Path("x" * 300, "y"))
    assert [files.meant(path) for path in unlistable] == ["", "", ""]


def test_files_that_are_added_to_a_folder_come_together_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "scores"
    with pytest.raises(OSError, match="none") as error, safe_files.files_added(folder) as added:
        (added / "x").write_text("new")
        raise OSError(errno.ENOSPC, "none", str(added / "x"))
    assert error.value.filename == str(folder) and listing(tmp_path) == []
    folder.mkdir(parents=True)
    (folder / "x").write_text("old")
    (folder / "other").touch()
    with pytest.raises(ValueError, match="stop"), safe_files.files_added(folder) as added:
        (added / "x").write_text("new")
        raise ValueError("stop")
    assert (folder / "x").read_text() == "old" and listing(folder) == ["other", "x"]
    with safe_files.files_added(folder) as added:
        (added / "x").write_text("new")
    assert (folder / "x").read_text() == "new" and listing(folder) == ["other", "x"]


def test_who_reads_and_writes_in_turn_loses_nothing(tmp_path):
    """Read, wait, write one more: without turns most of the additions are lost."""
    file = tmp_path / "new" / "count"

    def add_one() -> None:
        with safe_files.in_turn(file.parent):
            count = int(file.read_text()) if file.exists() else 0
            time.sleep(0.01)
            safe_files.write_text(file, str(count + 1))

    threads = [threading.Thread(target=add_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() == "8"


def test_a_folder_that_was_made_for_a_turn_goes_where_nothing_was_written(tmp_path):
    with suppress(ValueError), safe_files.in_turn(tmp_path / "a" / "b"):
        raise ValueError
    assert not (tmp_path / "a").exists()
