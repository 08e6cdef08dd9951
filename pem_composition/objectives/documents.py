"""A decoder learns documents, one per row: each token from those before it.

loss = 1/N sum_i sum_t CE(logits_it, x_i,t+1),  N the target tokens of the global batch: the text's
and its end token. With ``loss_on_padding`` rows are padded with the end token to --max_seq_length
and the padding counts, too, as in the reference code (labels = inputs); most of that loss is of end
tokens after end tokens. Evaluations count the text alone either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from pem_composition.errors import DataError
from pem_composition.evaluation.encoded import EncodedDataset, causal_rows
from pem_composition.objectives.cuts import cut_notes
from pem_composition.objectives.objective import ModelRows, Objective
from pem_composition.tasks.data import RowFiles, TaskData
from pem_composition.tasks.document_rows import ScoreFilter, load_documents
from pem_composition.tasks.glue import Reading, Task
from pem_composition.tasks.tokens import Tokens, begun

PADDED_NOTE = (
    "--loss_on_padding: documents are padded with the end token to --max_seq_length and the loss "
    "counts the padding, as the reference does; evaluations count the text alone"
)


@dataclass(frozen=True)
class Documents(Objective):
    """Documents, all of them or those with a score above a threshold."""

    chosen: ScoreFilter | None = None
    truncate: bool = True
    loss_on_padding: bool = False
    labelled = False

    def read(self, task_name: str | None, files: RowFiles, *, reading: Reading) -> TaskData:
        """``max_eval_samples`` is the limit of every split but the training rows."""
        data = load_documents(task_name, files, chosen=self.chosen, reading=reading)
        return replace(data, notes=(*data.notes, PADDED_NOTE)) if self.loss_on_padding else data

    def described(self, task: Task) -> dict[str, Any]:
        return {"objective": "causal_lm", **super().described(task)}

    def training_rows(self, rows: ModelRows) -> EncodedDataset:
        documents = self._tokens(rows)
        width = self.max_seq_length if self.loss_on_padding else 0
        end = rows.tokenizer.eos_token_id
        filled = [tokens + [end] * (width - len(tokens)) for tokens in documents]
        encoded = causal_rows([(row[:-1], row[1:]) for row in filled], rows.filler)
        # The attention mask tells text from padding, as a tokenizer's does.
        masks = [
            ([1] * len(tokens) + [0] * (width - len(tokens)))[: len(row) - 1]
            for tokens, row in zip(documents, filled, strict=True)
        ]
        whole, length = documents, max(map(len, documents))
        if self.truncate and length == self.max_seq_length:
            whole = _whole(rows)
        notes = cut_notes(
            rows.examples, [len(tokens) for tokens in whole], length,
            context=rows.context, loses="their end and its end token",
        )  # fmt: skip
        inputs = {**encoded.inputs, "attention_mask": masks}
        return replace(encoded, inputs=inputs, notes=notes)

    def scored_rows(self, rows: ModelRows) -> EncodedDataset:
        return causal_rows([(row[:-1], row[1:]) for row in self._tokens(rows)])

    def _tokens(self, rows: ModelRows) -> list[Tokens]:
        """Every document with its end token, cut at ``max_seq_length`` or whole.

        A document that is cut has no end token, as it does not end there.

        Raises:
            DataError: no documents, a length that leaves nothing to predict, or a whole document
                that is longer than the model's context.
        """
        if not rows.examples:
            raise DataError.build("documents", "no rows", expected="at least one")
        if self.max_seq_length < 2:
            raise DataError.build(
                "--max_seq_length", "leaves nothing to predict", found=self.max_seq_length,
                expected="at least 2 tokens",
            )  # fmt: skip
        documents = _whole(rows)
        if self.truncate:
            return [tokens[: self.max_seq_length] for tokens in documents]
        limit = rows.context or math.inf
        for example, tokens in zip(rows.examples, documents, strict=True):
            if len(tokens) > limit:
                raise DataError.build(
                    f"row {example.row_id}", "longer than the model's context",
                    found=f"{len(tokens)} tokens", expected=f"at most {limit}",
                    do="leave out --no-truncate to cut it at --max_seq_length",
                )  # fmt: skip
        return documents


def _whole(rows: ModelRows) -> list[Tokens]:
    """Every document with its end token."""
    end = rows.tokenizer.eos_token_id
    return [[*begun(rows.tokenizer, example.text), end] for example in rows.examples]
