"""Text to text: a language model of a domain, block i is read, block i + 1 is written.

loss = 1/N sum_i sum_t CE(logits_it, y_it),  N the target tokens of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pem_composition.errors import UsageError
from pem_composition.evaluation.encoded import EncodedDataset, with_targets
from pem_composition.objectives.objective import ModelRows, Objective
from pem_composition.tasks.data import RowFiles, TaskData
from pem_composition.tasks.document_rows import load_documents, next_blocks
from pem_composition.tasks.glue import Reading, Task
from pem_composition.tasks.tokens import start_tokens

if TYPE_CHECKING:
    from pem_composition.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class NextBlocks(Objective):
    """Blocks of ``max_seq_length`` tokens, cut from the documents in their order."""

    labelled = False

    def read(self, task_name: str | None, files: RowFiles, *, reading: Reading) -> TaskData:
        """``max_eval_samples`` is the limit of every split but the training rows."""
        return load_documents(task_name, files, reading=reading, unnamed=None)

    def described(self, task: Task) -> dict[str, Any]:
        return {"objective": "seq2seq", "target": "next_block", "block_size": self.max_seq_length}

    def within(self, limit: int | None) -> Self:
        """The same.

        Raises:
            UsageError: blocks are longer; cutting them would be another run.
        """
        _check(self.max_seq_length, limit)
        return self

    def training_rows(self, rows: ModelRows) -> EncodedDataset:
        """Pairs of neighbouring blocks of the documents, each document with its end token.

        A decoder alone reads both in one row, which begins as its tokenizer begins a text.

        Raises:
            DataError: fewer than two blocks.
            UsageError: two blocks are longer than a decoder's context.
        """
        tokenizer = rows.tokenizer
        texts = [example.text for example in rows.examples]
        ids = tokenizer(texts, add_special_tokens=False, truncation=False).input_ids
        documents = [[*row, tokenizer.eos_token_id] for row in ids]
        sources, targets = zip(*next_blocks(documents, self.max_seq_length), strict=True)
        if rows.decodes:
            begin = start_tokens(tokenizer)
            sources = tuple([*begin, *source] for source in sources)
            _check(2 * self.max_seq_length + len(begin), rows.context)
        inputs = {"input_ids": list(sources), "attention_mask": [[1] * len(s) for s in sources]}
        return with_targets(inputs, targets, tokenizer, rows.config)

    def prepared(self, rows: ModelRows, layout: Mapping[str, Any]) -> Evaluator:
        return super().prepared(rows, {"token_budget": None, **layout})


def _check(tokens: int, limit: int | None) -> None:
    """Refuse blocks that need more tokens than the model reads."""
    if limit is not None and tokens > limit:
        raise UsageError.build(
            "--block_size", "longer than the model takes", found=f"{tokens} tokens to read",
            expected=f"at most {limit}",
        )  # fmt: skip
