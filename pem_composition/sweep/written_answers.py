"""Instructions that stay prepared while modules are swapped: answers of each, kept as one record.

A record holds what is expensive, the answers and the log-likelihood of the reference answers.
Judging is done from records (``sweep/detoxification.py``), so that another judge costs no
generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.errors import DataError
from pem_composition.evaluation import beams, instruction_answers, standard_errors
from pem_composition.evaluation.decoding import BeamSearch
from pem_composition.evaluation.keys import rows_digest
from pem_composition.evaluation.precision import reduced
from pem_composition.evaluation.resumable import Batch, resume
from pem_composition.evaluation.toxicity.rates import is_empty, is_looping
from pem_composition.objectives.instructions import Instructions
from pem_composition.tasks.document_rows import LANGUAGE

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from pem_composition.evaluation.language import LanguageEvaluator
    from pem_composition.evaluation.text_sampling import Write
    from pem_composition.module import PEM
    from pem_composition.sweep.text_backend import TextBackend
    from pem_composition.tasks.data import Example
    from pem_composition.tasks.instruction_rows import Template


class InstructionRows:
    """One set of instructions, asked in one way; takes the place of ``Rows`` on a runner.

    Args:
        name: what the set is called in tables.
        max_seq_length: tokens of prompt and reference answer, which is cut there.
        batch_size: instructions per batch; None: by the device.
        backend: who answers in place of the model; None: nobody.

    Attributes:
        referenced: places of the rows that have a reference answer.

    Raises:
        DataError: a reference answer without words.
    """

    def __init__(
        self,
        name: str,
        examples: Sequence[Example],
        template: Template,
        search: BeamSearch,
        *,
        max_seq_length: int = 512,
        batch_size: int | None = None,
        backend: TextBackend | None = None,
    ) -> None:
        self.name, self.examples, self.template, self.search = name, examples, template, search
        self.batch_size, self.backend = batch_size, backend
        self.objective = Instructions(template, max_seq_length=max_seq_length)
        self.referenced = [i for i, row in enumerate(examples) if row.label is not None]
        self._check_references()
        self.identity = {
            "task": "instructions",
            **self.objective.described(LANGUAGE),
            "search": asdict(search),
            "rows": rows_digest(examples),
            **(backend.identity if backend else {}),
        }
        self._tokenizer: Any = None
        self._evaluator: LanguageEvaluator | None = None

    def _check_references(self) -> None:
        for i in self.referenced:
            example = self.examples[i]
            if not str(example.label).strip():
                raise DataError.build(
                    f"{self.name}, row {example.row_id}", "an empty reference answer",
                    found=repr(example.label), expected="a text, or no output at all",
                    do="write null where there is none",
                )  # fmt: skip

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that every instruction leaves room for an answer, and encode the references.

        Raises:
            DataError: no instructions, or one that leaves no room.
        """
        prompts = instruction_answers.prompt_tokens(self.template, self.examples, tokenizer)
        beams.check_room(model, tokenizer, prompts, self.search, self.name)
        self._tokenizer = tokenizer
        if self.referenced:
            rows = [self.examples[i] for i in self.referenced]
            device = next(model.parameters()).device
            self._evaluator = self.objective.evaluator(
                LANGUAGE, rows, tokenizer, model.config, device=device
            )

    def evaluate(
        self,
        model: nn.Module,
        partial: Path,
        key: str,
        *,
        bf16: bool = False,
        module: PEM | None = None,
    ) -> dict[str, Any]:
        """The answers, and per reference answer the sum of -log p and the number of tokens.

        Args:
            partial: where the batches are kept; those of an earlier run under the same key are not
                answered again.
            module: that is in the model, for the backend.
        """

        def write(skip: int) -> Iterator[Batch]:
            with self._answering(module, key, model) as writes:
                batches = instruction_answers.answer_batches(
                    model, self._tokenizer, self.examples, self.template, self.search,
                    batch_size=self.batch_size, name=self.name, skip=skip, write=writes,
                )  # fmt: skip
                for batch in batches:
                    yield [[place, answer._asdict()] for place, answer in batch.items()]

        with reduced(model, bf16):
            # The batches of another size are made of other rows.
            kept, _ = resume(partial, f"{key} {self.batch_size}", write)
            nll = None if self._evaluator is None else self._evaluator.predict(model).tolist()
        pairs = [pair for batch in kept for pair in batch]
        found = [row for _, row in sorted(pairs, key=lambda pair: pair[0])]
        return {**_progress([row["answer"] for row in found]), "nll": nll} | {
            name: [row[name] for row in found] for name in ("answer", "text", "new_tokens", "ended")
        }

    def _answering(
        self, module: PEM | None, key: str, model: nn.Module
    ) -> AbstractContextManager[Write | None]:
        """Who answers in place of the model with this module; None: nobody."""
        if self.backend is None:
            return nullcontext()
        name = f"{'base' if module is None else module.name} {key[:12]}"
        return self.backend.writing(module, name, model, self._tokenizer, self.search)


def _progress(answers: Sequence[str]) -> dict[str, Any]:
    """What a line of progress shows: words per answer, and the share that is no answer."""
    words = standard_errors.mean([len(answer.split()) for answer in answers])
    return {
        "metric": "words",
        "score": words.value,
        "standard_error": words.stderr or 0.0,
        "n": len(answers),
        "degenerate": False,
        "invalid_share": standard_errors.share(
            [is_empty(a) or is_looping(a) for a in answers]
        ).value,
    }
