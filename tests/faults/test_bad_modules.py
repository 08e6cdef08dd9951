"""Damaged, foreign and hostile module directories, through the command line.

Every case ends in one line on stderr that names the place and the finding, exit code 2, and
nothing written. The faults are those of a survey of what users' files look like when they break.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pem_composition.cli import load, parser
from pem_composition.config import BaseIdentity, LoraConfig
from pem_composition.module import PEM, HeadInfo

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.roberta.encoder.layer.{}.attention.self.{}"
Fault = Callable[[Path], None]


def module(seed: int) -> PEM:
    g = torch.Generator().manual_seed(seed)
    tensors = {"classifier.out_proj.weight.head": torch.randn(2, 16, generator=g)}
    for i in range(2):
        for target in ("query", "value"):
            layer = f"roberta.encoder.layer.{i}.attention.self.{target}"
            tensors[f"{layer}.lora_A"] = torch.randn(4, 16, generator=g)
            tensors[f"{layer}.lora_B"] = torch.randn(16, 4, generator=g)
    config = LoraConfig(r=4, alpha=8, target_modules=("query", "value"))
    return PEM(tensors, config, BaseIdentity("roberta-base"), head=HeadInfo(labels=("no", "yes")))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    module(0).save(tmp_path / "good")
    return tmp_path / "good"


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A module as another tool would have written it: without our checksums."""
    module(1).save(tmp_path / "bad")
    (tmp_path / "bad" / "pem.json").unlink()
    return tmp_path / "bad"


def config(**changes: object) -> Fault:
    """Change keys of the config; None removes one."""

    def break_it(folder: Path) -> None:
        raw = json.loads((folder / CONFIG).read_text())
        raw = {k: v for k, v in (raw | changes).items() if k not in changes or v is not None}
        (folder / CONFIG).write_text(json.dumps(raw))

    return break_it


def config_text(change: Callable[[str], str]) -> Fault:
    return lambda folder: (folder / CONFIG).write_text(change((folder / CONFIG).read_text()))


def data(change: Callable[[bytes], bytes]) -> Fault:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def tensors(change: Callable[[dict], object]) -> Fault:
    def break_it(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return break_it


def put(value: float) -> Fault:
    def change(held: dict) -> None:
        held[f"{LAYER.format(1, 'value')}.lora_B.weight"][3, 2] = value

    return tensors(change)


def renamed(rename: Callable[[str], str]) -> Fault:
    def change(held: dict) -> None:
        for name in list(held):
            held[rename(name)] = held.pop(name)

    return tensors(change)


def drop(*parts: str) -> Fault:
    def change(held: dict) -> None:
        for name in [n for n in held if all(p in n for p in parts)]:
            del held[name]

    return tensors(change)


def add(name: str, value: torch.Tensor) -> Fault:
    return tensors(lambda held: held.update({name: value}))


def instead(make: Callable[[Path], object]) -> Fault:
    """Something else under the name of the weights file."""

    def break_it(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        make(folder)

    return break_it


class Attack:
    """Unpickling this would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.mark}",))


def attack(folder: Path) -> None:
    with zipfile.ZipFile(folder / "adapter_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Attack(folder / "executed")}))


def bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + b"\0" * 50_000_000)


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def overlapping(raw: bytes) -> bytes:
    size = struct.unpack("<Q", raw[:8])[0]
    held = json.loads(raw[8 : 8 + size])
    names = [n for n in held if n != "__metadata__"]
    held[names[1]]["data_offsets"] = held[names[0]]["data_offsets"]
    return header(json.dumps(held).encode()) + raw[8 + size :]


FAULTS: dict[str, tuple[Fault, str]] = {
    # the directory
    "no such directory": (lambda f: f.rename(f.with_name("gone")), "no such directory"),
    "no config": (lambda f: (f / CONFIG).unlink(), "expected"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "weights are a directory": (instead(lambda f: (f / WEIGHTS).mkdir()), WEIGHTS),
    "weights are a FIFO": (instead(lambda f: os.mkfifo(f / WEIGHTS)), WEIGHTS),
    "weights link out of the folder": (
        instead(lambda f: (f / WEIGHTS).symlink_to("/etc/passwd")),
        WEIGHTS,
    ),
    # the config
    "config cut short": (config_text(lambda t: t[: len(t) // 2]), CONFIG),
    "config is a list": (config_text(lambda t: "[]"), CONFIG),
    "config key twice": (config_text(lambda t: t.replace("{", '{"r": 8,', 1)), "'r'"),
    "config value NaN": (config(lora_alpha=float("nan")), "NaN"),
    "no peft_type": (config(peft_type=None), "peft_type"),
    "unknown peft_type": (config(peft_type="LORAX"), "LORAX"),
    "no lora_alpha": (config(lora_alpha=None), "lora_alpha"),
    "lora_alpha is text": (config(lora_alpha="8"), "lora_alpha"),
    "lora_alpha is a bool": (config(lora_alpha=True), "lora_alpha"),
    "no r": (config(r=None), "r"),
    "r is zero": (config(r=0), "found 0"),
    "r is not that of the tensors": (config(r=8), "(4, 16)"),
    "r is a billion": (config(r=10**9), "1000000000"),
    "typo in a key": (config(lora_alfa=8), "lora_alfa"),
    "use_rslora removed by hand": (config(use_rslora=None, peft_version="0.21.2"), "use_rslora"),
    "DoRA": (config(use_dora=True), "use_dora"),
    "LoRA bias": (config(lora_bias=True), "lora_bias"),
    "trained biases": (config(bias="all"), "bias"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), "pissa"),
    "OLoRA": (config(init_lora_weights="olora"), "olora"),
    "trainable tokens": (config(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "LoftQ": (config(loftq_config={"loftq_bits": 4}), "loftq"),
    "other targets than tensors": (config(target_modules=["query", "value", "key"]), "key"),
    "fewer targets than tensors": (config(target_modules=["query"]), "value"),
    # the bytes of the weights
    "empty file": (data(lambda b: b""), WEIGHTS),
    "cut in the header": (data(lambda b: b[:60]), WEIGHTS),
    "cut in the data": (data(lambda b: b[:-100]), WEIGHTS),
    "bytes after the end": (data(lambda b: b + b"more"), WEIGHTS),
    "header of 2^63 bytes": (data(lambda b: struct.pack("<Q", 2**63) + b[8:]), WEIGHTS),
    "header is not JSON": (data(lambda b: header(b"{nonsense")), WEIGHTS),
    "header is not UTF-8": (data(lambda b: header(b'{"\xff": 1}')), WEIGHTS),
    "tensors overlap": (data(overlapping), WEIGHTS),
    # the tensors
    "NaN": (put(float("nan")), "layer.1.attention.self.value"),
    "infinity": (put(float("inf")), "layer.1.attention.self.value"),
    "A without B": (drop("layer.0", "query", "lora_B"), "layer.0.attention.self.query"),
    "a layer is missing": (drop("layer.0", "lora"), "layer"),
    "a tensor too many": (add("base_model.model.extra.weight", torch.ones(2)), "extra"),
    "DoRA magnitude": (
        add(f"{LAYER.format(0, 'query')}.lora_magnitude_vector", torch.ones(16)),
        "magnitude",
    ),
    "integers": (
        add(f"{LAYER.format(0, 'query')}.lora_A.weight", torch.ones(4, 16, dtype=torch.int8)),
        "I8",
    ),
    "lost prefix": (renamed(lambda n: n.removeprefix("base_model.model.")), "base_model.model."),
    "prefix of a wrapper": (renamed(lambda n: f"module.{n}"), "module."),
    # hostile
    "malicious pickle": (instead(attack), "system"),
    "zip bomb": (instead(bomb), "adapter_model.bin"),
    "a list instead of tensors": (
        instead(lambda f: torch.save([1, 2], f / "adapter_model.bin")),
        "adapter_model.bin",
    ),
}


def merge(*arguments: object) -> int:
    return parser.run(load("merge"), [str(a) for a in arguments], prog="merge.py")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_module_is_one_line_exit_2_and_nothing_written(name, good, bad, tmp_path, capsys):
    break_it, finding = FAULTS[name]
    break_it(bad)
    before = sorted(p for p in tmp_path.rglob("*"))
    code = merge("-a", good, bad, "-p", tmp_path / "out")
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1 and error.startswith("merge.py: error: ")
    assert str(bad) in error or "bad" in error
    assert finding in error
    assert sorted(p for p in tmp_path.rglob("*")) == before  # nothing written, nothing executed


def test_a_flipped_bit_is_caught_by_the_checksum(good, tmp_path, capsys):
    module(1).save(tmp_path / "bad")
    raw = bytearray((tmp_path / "bad" / WEIGHTS).read_bytes())
    for position in range(len(raw) - 1, len(raw) - 2000, -97):
        raw[position] ^= 0x10
        (tmp_path / "bad" / WEIGHTS).write_bytes(raw)
        assert merge("-a", good, tmp_path / "bad", "-p", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "sha256" in error and WEIGHTS in error
        assert not (tmp_path / "out").exists()
        raw[position] ^= 0x10


def test_swapped_bases_are_refused_with_both_names(good, tmp_path, capsys):
    PEM(module(1).tensors, module(1).config, BaseIdentity("gpt2-large")).save(tmp_path / "other")
    assert merge("-a", good, tmp_path / "other", "-p", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "roberta-base" in error and "gpt2-large" in error and "--allow_base_mismatch" in error


def test_a_full_disk_is_exit_3_and_the_old_output_stays(good, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        merge("-a", good, "-p", disk / "out")
        kept = {p.name: p.read_bytes() for p in (disk / "out").iterdir()}
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"x" * (free - 4096))
        program = Path(parser.__file__).parents[2] / "merge.py"
        words = ["-a", str(good), "-p", str(disk / "out"), "-o", "--coefficients", "2"]
        done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True)
        assert done.returncode == 3, done.stderr
        assert done.stderr.count("\n") == 1 and "space" in done.stderr.lower()
        assert {p.name: p.read_bytes() for p in (disk / "out").iterdir()} == kept
        assert sorted(p.name for p in disk.iterdir()) == ["ballast", "out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
