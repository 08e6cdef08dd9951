"""Damaged safetensors files."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from faults import damage as d
from faults.case import READERS, Case
from faults.oracle import close, updates
from faults.world import KEY, WEIGHTS

QUERY = f"{KEY.format(0, 'query')}.lora_A.weight"
FILE = f"bad/{WEIGHTS}"
RESTORE = "restore the file from its source"
SMALL = 400 * 1024**2  # address space of a program that does not import torch


def write_header_of_tensors(count: int) -> d.Damage:
    """Bad's weights: a valid header of empty tensors."""
    entry = '"%07d-name-of-a-tensor":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return d.data(lambda _: d.joined(f"{{{','.join(entry % i for i in range(count))}}}".encode()))


def twice(**changes: object) -> d.Damage:
    """One tensor a second time in the header, with changes."""

    def add(held: str) -> str:
        entry = json.loads(held)[QUERY] | changes
        return f'{held[:-1]}, "{QUERY}": {json.dumps(entry)}}}'

    return d.header_text(add)


def overlap(held: dict) -> None:
    names = sorted(n for n in held if n.endswith("lora_A.weight"))
    held[names[1]]["data_offsets"] = held[names[0]]["data_offsets"]


def flip(folder: Path) -> None:
    """One bit of one value."""
    path = folder / "bad" / WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)


CASES = (
    Case(
        "S01", "half of the weights file",
        f"{FILE}: the tensors do not cover the file exactly (truncated or with trailing bytes); "
        f"found ... bytes of values, expected ...; {RESTORE}",
        d.data(lambda raw: raw[: len(raw) // 2]),
    ),
    Case(
        "S02", "weights file cut in its header",
        f"{FILE}: safetensors header cut off; found 52 bytes after its length, expected ...; "
        f"{RESTORE}",
        d.data(lambda raw: raw[:60]),
    ),
    Case(
        "S03", "weights file of no bytes",
        f"{FILE}: too short for a safetensors file; found 0 bytes, expected at least 8; {RESTORE}",
        d.data(lambda raw: b""),
    ),
    Case(
        "S04", "header length 2^63",
        f"{FILE}: safetensors header too large; found 9223372036854775808 bytes, "
        f"expected <= 16777216; {RESTORE}",
        d.data(lambda raw: struct.pack("<Q", 2**63) + raw[8:]),
    ),
    Case(
        "S05", "header length 99 MB in a file of 100 bytes",
        f"{FILE}: safetensors header too large; found 99000000 bytes, expected <= 16777216; "
        f"{RESTORE}",
        d.data(lambda raw: struct.pack("<Q", 99_000_000) + raw[8:100]),
    ),
    Case(
        "S06", "valid header of 88 MB: 1.2 million empty tensors",
        f"{FILE}: safetensors header too large; found ... bytes, expected <= 16777216; {RESTORE}",
        write_header_of_tensors(1_200_000),
        run=(READERS[0],), memory=SMALL,
    ),
    Case(
        "S07", "header is not UTF-8",
        f"{FILE}: not UTF-8 text; expected JSON; restore the file",
        d.data(lambda raw: d.joined(b'{"\xff": 1}')),
    ),
    Case(
        "S08", "header is not JSON",
        f"{FILE}: not valid JSON: ...; {RESTORE}",
        d.data(lambda raw: d.joined(b"{nonsense")),
    ),
    Case(
        "S09", "two tensors in the same bytes",
        f"{FILE}: tensor '{KEY.format(0, 'value')}.lora_A.weight' has a wrong offset; found ..., "
        f"expected ...; {RESTORE}",
        d.header(overlap),
    ),
    Case(
        "S10", "bytes after the end",
        f"{FILE}: the tensors do not cover the file exactly (truncated or with trailing bytes); "
        f"found ... bytes of values, expected ...; {RESTORE}",
        d.data(lambda raw: raw + b"PK\3\4 and a zip file"),
    ),
    Case(
        "S11", "shape larger than the bytes",
        f"{FILE}: tensor '{QUERY}': data_offsets ... do not fit its shape; found [5, 32], "
        f"expected equal sizes; {RESTORE}",
        d.entry(shape=[5, 32]),
    ),
    Case(
        "S12", "shape whose size overflows 64 bits",
        f"{FILE}: tensor '{QUERY}': data_offsets ... do not fit its shape; "
        f"found [9223372036854775807, 9223372036854775807], expected equal sizes; {RESTORE}",
        d.entry(shape=[2**63 - 1, 2**63 - 1]),
    ),
    Case(
        "S13", "a tensor twice in the header, at other bytes",
        f"{FILE}: not valid JSON: the key '{QUERY}' appears twice; {RESTORE}",
        twice(data_offsets=[512, 1024]),
    ),
    Case(
        "S13b", "a tensor twice in the header, same bytes and another dtype",
        f"{FILE}: not valid JSON: the key '{QUERY}' appears twice; {RESTORE}",
        twice(dtype="I32"),
    ),
    Case(
        "S14", "tensor named ../../etc/passwd",
        f"{FILE}: tensor '../../etc/passwd' lacks PEFT's prefix; found , "
        "expected base_model.model.; ...",
        d.add("../../etc/passwd", torch.ones(2)),
    ),
    Case(
        "S15", "dtype Q7",
        f"{FILE}: tensor '{QUERY}' has an unknown dtype; found Q7, expected F64, F32, ...; "
        f"{RESTORE}",
        d.entry(dtype="Q7"),
    ),
    Case(
        "S16", "negative offset",
        f"{FILE}: tensor '{QUERY}' has a malformed data_offsets; found [-16, 496], "
        f"expected whole numbers >= 0; {RESTORE}",
        d.entry(data_offsets=[-16, 496]),
    ),
    Case(
        "S17", "one bit flipped, in a module of ours",
        f"{FILE}: changed since it was written (sha256 differs from pem.json); found ..., "
        "expected ...; restore the file, or delete pem.json if the change is intended",
        d.both(d.record(), flip), header=False,
    ),
    Case(
        "S17b", "one bit flipped, in a module without pem.json",
        "out = +1*bad  (space parameter, head average, error against sum c_i dW_i: 0)",
        flip, run=(("merge", "-a", "bad", "-p", "out"),), code=0,
        check=lambda here: close(updates(here / "out"), updates(here / "bad")),
    ),
    Case(
        "S18", "NaN in a weight",
        f"{FILE}: tensor '{KEY.format(1, 'value')}.lora_B.weight' is not finite; found 1 NaN or "
        "infinite of 128 values, expected finite values; the run that made it diverged; use an "
        "earlier checkpoint",
        d.put(float("nan")), header=False,
    ),
    Case(
        "S19", "infinity in a weight",
        f"{FILE}: tensor '{KEY.format(1, 'value')}.lora_B.weight' is not finite; found 1 NaN or "
        "infinite of 128 values, expected finite values; the run that made it diverged; use an "
        "earlier checkpoint",
        d.put(float("inf")), header=False,
    ),
    Case(
        "S20", "weights are a directory",
        f"{FILE}: cannot be read; found a directory, expected a regular file",
        d.instead(lambda bad: (bad / WEIGHTS).mkdir()),
    ),
    Case(
        "S21", "weights are a FIFO",
        f"{FILE}: cannot be read; found a FIFO, expected a regular file",
        d.instead(lambda bad: os.mkfifo(bad / WEIGHTS)),
        run=READERS[:3], memory=SMALL,
    ),
    Case(
        "S22", "no tensors in the weights file",
        f"{FILE}: no tensors; expected the module's tensors; save the module again with the "
        "library that made it",
        d.tensors(lambda held: held.clear()),
    ),
    Case(
        "S25", "a number in the header's __metadata__",
        f"{FILE}: safetensors __metadata__ malformed; found {{'format': 1}}, expected text values; "
        f"{RESTORE}",
        d.header(lambda held: held.update(__metadata__={"format": 1})),
    ),
)  # fmt: skip
