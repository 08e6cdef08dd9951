"""Random damage to bytes, headers, JSON, pickles and expressions; all draws from one generator.

The generator is ``random.Random`` in scripts/fuzz.py, and hypothesis's stand-in, which it can
shrink, in the tests.
"""

from __future__ import annotations

import copy
import json
import pickletools
import struct
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30,
           10**400, 0.5, -0.0, 1e-320, 1e30, 1e308)  # fmt: skip
TEXTS = ("", " ", "x", "r", "query", "lora", "../..", "/etc/passwd", "a/b", ".", "..", "a" * 2000,
         "base_model.model.", "layer.9999999999.q", "\u00e9", "\u202e", "\x1b[2J", "\n", "\0",
         "\ud800", "\u0663", "\u00b2", "(a+)+$", "True", "nan", "{}", "%s", "{0}")  # fmt: skip
JUNK: tuple[Any, ...] = (*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [None], {"x": 1},
                         ["query"], ["query", 1], [["q"]], {"query": 4}, {"": 0},
                         [[[[[[[[[["deep"]]]]]]]]]], [1] * 200)  # fmt: skip
Change = Callable[[Random, bytes], bytes]


def some_bytes(rng: Random, most: int = 16) -> bytes:
    return bytes(rng.randrange(256) for _ in range(rng.randrange(1, most)))


def span(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 512)))


def flip_bit(rng: Random, data: bytes) -> bytes:
    """One bit, anywhere."""
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set(rng: Random, data: bytes) -> bytes:
    start, stop = span(rng, data)
    return data[:start] + some_bytes(rng, stop - start + 2)[: stop - start] + data[stop:]


def _cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _delete(rng: Random, data: bytes) -> bytes:
    start, stop = span(rng, data)
    return data[:start] + data[stop:]


def _insert(rng: Random, data: bytes) -> bytes:
    start, stop = span(rng, data)
    return data[:start] + rng.choice((some_bytes(rng), data[start:stop])) + data[start:]


def _zero(rng: Random, data: bytes) -> bytes:
    start, stop = span(rng, data)
    return data[:start] + bytes(stop - start) + data[stop:]


def _length(rng: Random, data: bytes) -> bytes:
    number = rng.choice((0, 1, 2, 8, len(data), len(data) - 8, 2**31, 2**32, 2**63, 2**64 - 1))
    (old,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    nearby = (old + rng.randrange(-16, 17)) % 2**64
    return struct.pack("<Q", rng.choice((number, nearby))) + data[8:]


BYTES: tuple[Change, ...] = (flip_bit, _set, _cut, _delete, _insert, _zero)


def change_bytes(rng: Random, data: bytes) -> bytes:
    """One to three changes."""
    for _ in range(rng.randrange(1, 4)):
        data = rng.choice(BYTES)(rng, data) if data else some_bytes(rng)
    return data


# --- JSON ---


def change_json(rng: Random, text: bytes) -> bytes:
    """Values, keys and structure; sometimes the text itself."""
    if not rng.randrange(5):
        return change_bytes(rng, text)
    value = json.loads(text)
    for _ in range(rng.randrange(1, 4)):
        _change_value(rng, value)
    out = json.dumps(value, ensure_ascii=bool(rng.randrange(2)))
    if not rng.randrange(8):
        out = rng.choice(TEXT_CHANGES)(rng, out)
    return out.encode("utf-8", "surrogatepass")


def _junk(rng: Random) -> Any:
    return copy.deepcopy(rng.choice(JUNK))


def _change_value(rng: Random, value: Any) -> None:
    """Go down to some container and replace, remove, rename or add an entry."""
    while True:
        inner = [v for v in (value.values() if isinstance(value, dict) else value)
                 if isinstance(v, dict | list) and v]  # fmt: skip
        if not inner or not rng.randrange(3):
            break
        value = rng.choice(inner)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if isinstance(value, list):
        if not keys or not rng.randrange(3):
            value.insert(rng.randrange(len(keys) + 1), _junk(rng))
        elif rng.randrange(2):
            value[rng.choice(keys)] = _junk(rng)
        else:
            del value[rng.choice(keys)]
        return
    action = rng.randrange(5) if keys else 4
    if action < 2:
        value[rng.choice(keys)] = _junk(rng)
    elif action == 2:
        value[_typo(rng, keys)] = value.pop(rng.choice(keys))
    elif action == 3:
        del value[rng.choice(keys)]
    else:
        value[rng.choice(TEXTS)] = _junk(rng)


def _typo(rng: Random, keys: list[str]) -> str:
    word = rng.choice(keys)
    at = rng.randrange(len(word) + 1)
    return rng.choice((word[:at] + word[at + 1 :], word + "s", word.upper(), rng.choice(TEXTS)))


def _twice(rng: Random, text: str) -> str:
    """The first key again."""
    key = text[1:].split(":")[0] if len(text) > 2 else '"x"'
    return f"{{{key}: {rng.choice(NUMBERS)}, {text[1:]}"


def _constant(rng: Random, text: str) -> str:
    word = rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "4" * 5000, "01", "+1", "0x1"))
    return text.replace(": ", f": {word}, ", 1) if rng.randrange(2) else f'{{"r": {word}}}'


def _brackets(rng: Random, text: str) -> str:
    depth = rng.choice((10, 60, 500, 5000))
    return f'{{"deep": {"[" * depth}{"]" * depth}, {text[1:]}'


def _tail(rng: Random, text: str) -> str:
    return text + rng.choice((" ", "\n", "}", "{}", "\0", "//", ","))


TEXT_CHANGES = (_twice, _constant, _brackets, _tail)


# --- safetensors ---


def change_safetensors(rng: Random, raw: bytes) -> bytes:
    """Bytes, the length field, or entries of the header."""
    kind = rng.randrange(6)
    if kind == 0:
        return change_bytes(rng, raw)
    if kind == 1:
        return _length(rng, raw)
    size = struct.unpack("<Q", raw[:8])[0]
    text, values = raw[8 : 8 + size], raw[8 + size :]
    if kind == 2:
        text = change_json(rng, text.strip())
    elif kind == 3:
        text = change_bytes(rng, text)
    else:
        held = json.loads(text)
        for _ in range(rng.randrange(1, 3)):
            rng.choice(HEADER_CHANGES)(rng, held)
        text = json.dumps(held).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + values


def _names(held: dict[str, Any]) -> list[str]:
    return [n for n, entry in held.items() if isinstance(entry, dict) and "shape" in entry]


def _rename(rng: Random, held: dict[str, Any]) -> None:
    name = rng.choice(_names(held) or ["x"])
    held[_typo(rng, [name])] = held.pop(name, {})


def _swap_names(rng: Random, held: dict[str, Any]) -> None:
    names = _names(held)
    if len(names) > 1:
        a, b = rng.choice(names), rng.choice(names)
        held[a], held[b] = held[b], held[a]


def _dtype(rng: Random, held: dict[str, Any]) -> None:
    for name in _names(held)[: rng.randrange(1, 4)]:
        held[name]["dtype"] = rng.choice(
            ("F32", "F16", "BF16", "F64", "I32", "I8", "F8_E4M3", "Q7")
        )


def _shape(rng: Random, held: dict[str, Any]) -> None:
    for name in _names(held)[: rng.randrange(1, 3)]:
        shape = held[name]["shape"]
        held[name]["shape"] = rng.choice(
            (
                shape[::-1],
                [*shape, 1],
                [n * 2 for n in shape],
                [],
                [0, *shape],
                [rng.choice(NUMBERS)],
            )
        )


def _offsets(rng: Random, held: dict[str, Any]) -> None:
    names = _names(held)
    if names:
        a, b = held[rng.choice(names)], held[rng.choice(names)]
        shift = rng.choice((0, 1, 4, -4, 512, 2**40))
        a["data_offsets"] = [n + shift for n in b["data_offsets"]]


def _drop(rng: Random, held: dict[str, Any]) -> None:
    held.pop(rng.choice(list(held) or ["x"]), None)


def _metadata(rng: Random, held: dict[str, Any]) -> None:
    held["__metadata__"] = rng.choice(({}, {"format": "tf"}, {"x": 1}, [], None, "pt", {"x": "y"}))


HEADER_CHANGES = (_rename, _swap_names, _dtype, _shape, _offsets, _drop, _metadata)


# --- pickles ---

STREAMS = (b"cposix\nsystem\nX\x0e\0\0\0touch executed\x85R",
           b"cbuiltins\neval\nX\x01\0\0\0" + b"1\x85R", b"N", b"}", b"]", b")", b"(", b"0",
           b"2", b"s", b"u", b"a", b"e", b"R", b"b", b"Q", b".", b"t", b"\x85", b"\x86",
           b"h\x00", b"q\x00", b"r\xff\xff\xff\x7f", b"j\xff\xff\0\0",
           b"K\x05", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"G" + b"\x7f" * 8,
           b"X\xff\xff\xff\xff", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n",
           b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_tensor_v2\n")  # fmt: skip


def change_pickle(rng: Random, stream: bytes) -> bytes:
    """Opcodes removed, repeated, exchanged or put in; arguments changed; sometimes any bytes."""
    for _ in range(rng.randrange(1, 4)):
        try:
            starts = [at for _, _, at in pickletools.genops(stream)]
        except Exception:  # damaged by an earlier change
            return change_bytes(rng, stream)
        starts.append(len(stream))
        i = rng.randrange(len(starts) - 1)
        start, stop = starts[i], starts[i + 1]
        other = starts[rng.randrange(len(starts) - 1)]
        action = rng.randrange(6)
        if action == 0:
            stream = stream[:start] + stream[stop:]
        elif action == 1:
            stream = stream[:stop] + stream[start:]
        elif action == 2:
            stream = stream[:start] + rng.choice(STREAMS) + stream[start:]
        elif action == 3:
            stream = stream[:start] + rng.choice(STREAMS) + stream[stop:]
        elif action == 4 and start + 1 < stop:
            at = rng.randrange(start + 1, stop)
            stream = stream[:at] + bytes([rng.randrange(256)]) + stream[at + 1 :]
        else:
            stream = stream[:start] + stream[other : other + 8] + stream[stop:]
    return stream


# --- expressions ---

PIECES = ("a", "b", "c", "a", "b", "+", "-", "*", "/", "(", ")", ",", "negate(", "mean(", "0.5",
          "ties(", "iso_c(", "delta(", "layers(", "density=", "rank=", '"*"', "seed=7",
          "2", "1e3", ".5", "-7e-1", "1e308", "1e999", "0", "x", "lambda", "__import__", "\u00e9",
          "\u00b2", "\u0663", "**", "//", "a.b", "'", '"', "\\", "\0", "\n", "\t", ";", "#", "=",
          "[", "]", "{", "}", "@", "%", "1_0", "0x1", "1j", "nan", "inf", "(" * 60, "-" * 40,
          "a+" * 50)  # fmt: skip


def some_expression(rng: Random) -> str:
    """Pieces of expressions, of other languages and of none, in any order."""
    return rng.choice(("", " ")).join(
        rng.choice(PIECES) for _ in range(rng.randrange(1, rng.choice((4, 8, 30))))
    )
