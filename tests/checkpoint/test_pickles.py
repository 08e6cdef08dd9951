"""The restricted reader of torch zip files: torch.load on tensors, deaf to everything else."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from pem_composition.checkpoint.pickles import TorchZipFile
from pem_composition.checkpoint.tensors import read_raw
from pem_composition.errors import CheckpointError


def rewrite(source: Path, target: Path, change: dict[str, bytes | None], **options: object) -> Path:
    """Copy a zip file with some entries replaced (by suffix) or dropped."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:  # type: ignore[arg-type]
        for item in old.infolist():
            data = old.read(item)
            for suffix, value in change.items():
                if item.filename.endswith(suffix):
                    data = value  # type: ignore[assignment]
            if data is not None:
                new.writestr(item.filename, data)
    return target


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.bin"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}, path)
    return path


def test_values_equal_torch_load(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    state = OrderedDict(
        whole=base,
        transposed=base.T,
        sliced=base[1:5:2, 1:],
        repeated=base[2, :2].expand(3, 2),
        scalar=torch.tensor(3.0, dtype=torch.float64),
        half=torch.randn(3).half(),
        brain=torch.randn(3).bfloat16(),
        count=torch.arange(5),
        flag=torch.tensor([True, False]),
        empty=torch.zeros(0, 2),
        parameter=nn.Parameter(torch.randn(2, 2)),
    )
    path = tmp_path / "x.bin"
    torch.save(state, path)
    expected = torch.load(path, weights_only=True)
    with TorchZipFile(path) as file:
        assert list(file.infos) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(read_raw(file, name), tensor.detach())


def test_the_state_dict_of_a_module_with_metadata_is_read(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    torch.save(module.state_dict(), tmp_path / "x.bin")  # an OrderedDict with _metadata (BUILD)
    with TorchZipFile(tmp_path / "x.bin") as file:
        assert torch.equal(read_raw(file, "0.weight"), module[0].weight.detach())


class Payload:
    def __init__(self, module: str, marker: Path) -> None:
        self.module, self.marker = module, marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        command = f"touch {self.marker}"
        return {"posix": os.system, "builtins": eval}[self.module], (command,)


@pytest.mark.parametrize(
    ("module", "name"), [("posix", "posix.system"), ("builtins", "__builtin__.eval")]
)
def test_a_malicious_pickle_is_refused_by_name_and_not_executed(
    tmp_path: Path, plain: Path, module: str, name: str
) -> None:
    marker = tmp_path / "executed"
    stream = pickle.dumps({"a": Payload(module, marker)}, protocol=2)
    path = rewrite(plain, tmp_path / "bad.bin", {"data.pkl": stream})
    with pytest.raises(CheckpointError) as error:
        TorchZipFile(path)
    assert name in str(error.value)
    assert str(path) in str(error.value)
    assert "expected tensors only" in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (pickle.dumps([1]), "a list"),
        (pickle.dumps({"a": 1}), "a int"),
        (pickle.dumps({1: "x"}), "entry 1"),
        (pickle.dumps({"a": {"b": 1}}), "a dict"),
        (pickle.dumps({"a": 10**30}), "a int|opcode"),
        (b"\x80\x02(cposix\nsystem\nS'id'\no.", "opcode OBJ|opcode STRING"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo index"),
        (b"\x80\x02}q\x00", "damaged"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "damaged|a _StorageType"),
    ],
)
def test_other_streams_are_refused(tmp_path: Path, plain: Path, stream: bytes, words: str) -> None:
    path = rewrite(plain, tmp_path / "bad.bin", {"data.pkl": stream})
    with pytest.raises(CheckpointError, match=words):
        TorchZipFile(path)


def test_a_legacy_pickle_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch < 1\.6") as error:
        TorchZipFile(path)
    assert "safetensors" in str(error.value)


def test_a_compressed_entry_a_zip_bomb_is_not_read(tmp_path: Path, plain: Path) -> None:
    path = rewrite(plain, tmp_path / "bomb.bin", {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        TorchZipFile(path)


def test_a_storage_of_the_wrong_size_is_refused(tmp_path: Path, plain: Path) -> None:
    for change in ({"data/0": b"1234"}, {"data/0": None}):
        path = rewrite(plain, tmp_path / "bad.bin", change)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="storage of tensor 'a'"):
            TorchZipFile(path)


def test_an_expanded_tensor_cannot_multiply_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, path)
    with pytest.raises(CheckpointError, match="reaches out of its storage"):
        TorchZipFile(path)


def test_a_flipped_bit_or_a_cut_file_is_noticed(tmp_path: Path, plain: Path) -> None:
    data = plain.read_bytes()
    value = struct.pack("<f", 5.0)
    at = data.index(value)
    flipped = tmp_path / "flipped.bin"
    flipped.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with TorchZipFile(flipped) as file, pytest.raises(CheckpointError, match="CRC"):
        file.read("a")
    cut = tmp_path / "cut.bin"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged zip"):
        TorchZipFile(cut)


def test_entries_never_become_paths(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"../../escape": torch.ones(2)}, buffer)
    path = tmp_path / "x.bin"
    path.write_bytes(buffer.getvalue())
    with TorchZipFile(path) as file:
        assert list(file.infos) == ["../../escape"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin"]
