"""Ways to damage the module ``bad`` in a folder; each returns a function of the folder."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.world import BIN, CONFIG, KEY, WEIGHTS
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]
REMOVED = object()


def both(*damages: Damage) -> Damage:
    """One after the other."""

    def apply(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return apply


# --- the config ---


def config(**changes: Any) -> Damage:
    """Change keys of bad's config; ``REMOVED`` takes one away."""

    def apply(folder: Path) -> None:
        path = folder / "bad" / CONFIG
        raw = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in raw.items() if v is not REMOVED}))

    return apply


def config_text(change: Callable[[str], str]) -> Damage:
    """Change the text of bad's config."""

    def apply(folder: Path) -> None:
        path = folder / "bad" / CONFIG
        path.write_text(change(path.read_text()))

    return apply


def record(**changes: Any) -> Damage:
    """Make bad one of ours again, with changes to its pem.json."""

    def apply(folder: Path) -> None:
        for file in (folder / "ours").iterdir():
            (folder / "bad" / file.name).write_bytes(file.read_bytes())
        path = folder / "bad" / "pem.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


# --- the bytes of the weights ---


def data(change: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of bad's weights."""

    def apply(folder: Path) -> None:
        path = folder / "bad" / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return apply


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and values of a safetensors file."""
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header: bytes, values: bytes = b"") -> bytes:
    """A safetensors file with this header, whatever it says."""
    return struct.pack("<Q", len(header)) + header + values


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of bad's weights."""

    def rewrite(raw: bytes) -> bytes:
        held, values = split(raw)
        change(held)
        return joined(json.dumps(held).encode(), values)

    return data(rewrite)


def entry(**changes: Any) -> Damage:
    """Change the header entry of one tensor."""
    return header(lambda held: held[f"{KEY.format(0, 'query')}.lora_A.weight"].update(changes))


def header_text(change: Callable[[str], str]) -> Damage:
    """Change the header's text."""

    def rewrite(raw: bytes) -> bytes:
        held, values = split(raw)
        return joined(change(json.dumps(held)).encode(), values)

    return data(rewrite)


# --- the tensors ---


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of bad."""

    def apply(folder: Path) -> None:
        held = load_file(folder / "bad" / WEIGHTS)
        change(held)
        save_file(held, folder / "bad" / WEIGHTS)

    return apply


def put(value: float) -> Damage:
    """One value of one factor."""

    def change(held: dict[str, torch.Tensor]) -> None:
        held[f"{KEY.format(1, 'value')}.lora_B.weight"][3, 2] = value

    return tensors(change)


def renamed(rename: Callable[[str], str]) -> Damage:
    """Every tensor under another name."""

    def change(held: dict[str, torch.Tensor]) -> None:
        for name in list(held):
            held[rename(name)] = held.pop(name)

    return tensors(change)


def drop(*parts: str) -> Damage:
    """Take away the tensors whose name holds all the parts."""

    def change(held: dict[str, torch.Tensor]) -> None:
        for name in [n for n in held if all(p in n for p in parts)]:
            del held[name]

    return tensors(change)


def add(name: str, value: torch.Tensor) -> Damage:
    """One more tensor."""
    return tensors(lambda held: held.update({name: value}))


def magnitudes() -> Damage:
    """DoRA's magnitudes, 1 for every output."""

    def change(held: dict[str, torch.Tensor]) -> None:
        factors = {n: t for n, t in held.items() if n.endswith(".lora_B.weight")}
        for name, B in factors.items():
            held[name.replace(".lora_B.weight", ".lora_magnitude_vector")] = torch.ones(len(B))

    return tensors(change)


# --- something else in place of the weights ---


def instead(make: Callable[[Path], object]) -> Damage:
    """Remove bad's weights and let ``make`` put something into its folder."""

    def apply(folder: Path) -> None:
        (folder / "bad" / WEIGHTS).unlink()
        make(folder / "bad")

    return apply


def as_bin(folder: Path) -> None:
    """The same weights as a torch zip file."""
    torch.save(load_file(folder / WEIGHTS), folder / BIN)
    (folder / WEIGHTS).unlink()


class Attack:
    """Unpickling this leaves a file ``executed`` in the working directory."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


def pickled(stream: bytes, **options: Any) -> Damage:
    """A torch zip file with this data.pkl as bad's weights."""
    return instead(lambda folder: write_bin(folder / BIN, stream, **options))


def write_bin(path: Path, stream: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """A zip file of one entry, data.pkl."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", stream)


ATTACK = pickle.dumps({"x": Attack()}, protocol=2)


def doubled(levels: int, outermost: bytes) -> bytes:
    """A pickle of tuples (t, t) inside each other, then opcodes that use the last one."""
    nested = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
                      for i in range(levels))  # fmt: skip
    return b"\x80\x02)q\x00" + nested + outermost


def sparse(path: Path, size: int) -> None:
    """Weights of one layer and a head of ``size`` bytes, none of which is on the disk."""
    layer = KEY.format(0, "query")
    shapes = {f"{layer}.lora_A.weight": [4, 32], f"{layer}.lora_B.weight": [32, 4],
              "base_model.model.classifier.weight": [size // 4]}  # fmt: skip
    held, position = {}, 0
    for name, shape in shapes.items():
        stop = position + 4 * math.prod(shape)
        held[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    path.write_bytes(joined(json.dumps(held).encode()))
    os.truncate(path, path.stat().st_size + position)
