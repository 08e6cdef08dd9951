"""Rows as token numbers: what a model reads and what it should answer. No torch.

Tokenised once, in the order of the rows and of different lengths; whoever asks a model pads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pem_composition.errors import DataError
from pem_composition.tasks.data import Example
from pem_composition.tasks.tokens import Tokens, first_token

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
IGNORED = -100  # a token that is read, but not counted


@dataclass(frozen=True)
class EncodedDataset:
    """Tokenised rows in their original order, of different lengths.

    Indexing gives what a Hugging Face data collator pads: ``input_ids``, ``attention_mask``,
    ``token_type_ids`` where the model has them, and ``labels`` unless the row has none.

    Attributes:
        notes: what a user should know of the rows, such as how many were cut.
    """

    inputs: Mapping[str, list[list[int]]]
    labels: tuple[int | float | None, ...]
    padding: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {name: rows[index] for name, rows in self.inputs.items()}
        if self.labels[index] is not None:
            row["labels"] = self.labels[index]
        return row

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        return [len(ids) for ids in self.inputs["input_ids"]]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_seq_length: int = 128,
) -> EncodedDataset:
    """Tokenise every row once; longer rows are cut, the longer text of a pair first.

    An empty text is read as the start token where the tokenizer adds none (GPT-2).

    Raises:
        DataError: no rows, an empty one without such a token, or a length of less than 8 tokens.
    """
    if not examples:
        raise DataError.build("encode", "no rows", expected="at least one")
    if max_seq_length < 8:
        raise DataError.build(
            "--max_seq_length", "too short", found=max_seq_length, expected="at least 8 tokens"
        )
    texts = [e.text for e in examples]
    pairs = [e.text_pair for e in examples] if examples[0].text_pair is not None else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_seq_length, padding=False)
    padding = {
        "input_ids": tokenizer.pad_token_id or 0,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    inputs = {name: list(encoded[name]) for name in INPUT_NAMES if name in encoded}
    if "attention_mask" not in inputs:
        inputs["attention_mask"] = [[1] * len(ids) for ids in inputs["input_ids"]]
    for place, example in enumerate(examples):
        if not inputs["input_ids"][place]:  # a model cannot read nothing
            token = first_token(tokenizer, f"row {example.row_id}")
            row = {"input_ids": token, "attention_mask": 1, "token_type_ids": 0}
            for name, column in inputs.items():
                column[place] = [row[name]]
    return EncodedDataset(inputs, tuple(e.label for e in examples), padding)


def causal_rows(rows: Sequence[tuple[Tokens, Tokens]], filler: int = 0) -> EncodedDataset:
    """Pairs of what is read and what should follow each token of it, the labels."""
    inputs = {
        "input_ids": [read for read, _ in rows],
        "attention_mask": [[1] * len(read) for read, _ in rows],
    }
    targets: Any = tuple(targets for _, targets in rows)
    return EncodedDataset(inputs, targets, {"input_ids": filler, "attention_mask": 0})


class Writing(NamedTuple):
    """How a model writes.

    Attributes:
        start: decoder start token, and special tokens before the first word; empty for a decoder
            alone, which goes on where its prompt ends.
        end: what ends an answer.
        pad: what fills a batch.
    """

    start: tuple[int, ...]
    end: int
    pad: int


def writing_of(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Writing:
    """How the model writes: T5 starts from its padding token, BART from </s> <s>.

    Raises:
        DataError: an encoder-decoder names no start token, or the tokenizer no end token.
    """
    start, end = getattr(config, "decoder_start_token_id", None), tokenizer.eos_token_id
    if end is None or (config.is_encoder_decoder and start is None):
        raise DataError.build(
            "--model_name_or_path", "does not say how it starts and ends what it writes",
            found=f"decoder_start_token_id {start}, eos_token_id {end}", expected="both tokens",
        )  # fmt: skip
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if not config.is_encoder_decoder:
        return Writing((), end, pad)
    before = tokenizer(text_target="").input_ids
    if before and before[-1] == end:
        before = before[:-1]
    return Writing((start, *before), end, pad)


def with_targets(
    inputs: dict[str, list[Tokens]],
    targets: Sequence[Tokens],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> EncodedDataset:
    """Inputs of an encoder, what its decoder reads, and the labels that it should write.

    A decoder alone reads both in one row; only what it should write is counted.
    """
    pad = tokenizer.pad_token_id or 0
    if not config.is_encoder_decoder:
        pairs = zip(inputs["input_ids"], targets, strict=True)
        return causal_rows(
            [([*read, *new[:-1]], [IGNORED] * (len(read) - 1) + new) for read, new in pairs], pad
        )
    start = writing_of(tokenizer, config).start[0]
    read = {"decoder_input_ids": [[start, *target[:-1]] for target in targets]}
    fillers = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "decoder_input_ids": pad}
    labels: Any = tuple(targets)
    return EncodedDataset(inputs | read, labels, fillers)
