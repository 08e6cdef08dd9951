"""One causal language model, alone or with a module: what it writes, how well it reads a text.

A file of texts or answers appears when everything is there; a run that was stopped goes on behind
its last batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pem_composition import json_lines
from pem_composition.adapters import attach
from pem_composition.evaluation import keys
from pem_composition.evaluation.attached import device_of, load_module, on_device, say_slow
from pem_composition.evaluation.decoding import BeamSearch, Prompts, Windows
from pem_composition.evaluation.instruction_answers import answer_batches
from pem_composition.evaluation.load_options import AS_IT_IS, LoadOptions
from pem_composition.evaluation.long_texts import perplexity, read_texts, text_evaluator
from pem_composition.evaluation.model_names import resolve
from pem_composition.evaluation.models import load_causal
from pem_composition.evaluation.precision import reduced
from pem_composition.evaluation.resumable import Batch, partial_path, resume
from pem_composition.evaluation.text_sampling import sample_rows
from pem_composition.tasks.data import Example
from pem_composition.tasks.document_rows import LANGUAGE
from pem_composition.tasks.instruction_rows import Template


@dataclass(frozen=True, kw_only=True)
class CausalModel:
    """A decoder that is loaded when it is needed.

    Attributes:
        base: folder or name of the model.
        adapter: folder of a module to attach; None: the model alone.
    """

    base: str
    adapter: str | None = None
    load_options: LoadOptions = AS_IT_IS
    bf16: bool = False
    use_cpu: bool = False
    allow_base_mismatch: bool = False

    def identity(self) -> dict[str, Any]:
        """Everything about the model that decides what it writes."""
        base = resolve(self.base)
        return {
            "base": keys.base_digest(base),
            "generation": keys.generation_digest(base),
            "module": None if self.adapter is None else keys.module_digest(self.adapter),
            "bf16": self.bf16,
            "load_options": repr(self.load_options),
            "device": device_of(self.use_cpu),
        }

    @contextmanager
    def open(self) -> Iterator[tuple[Any, Any]]:
        """Model and tokenizer, on the device and in the precision asked for.

        Raises:
            CheckpointError, IncompatibleModules: a model or module that cannot be used.
        """
        mismatch = self.allow_base_mismatch
        module = self.adapter and load_module(
            self.adapter, self.base, LANGUAGE, allow_base_mismatch=mismatch
        )
        model, tokenizer, _ = load_causal(self.base, load_options=self.load_options)
        if module:
            attach(model, module, allow_base_mismatch=mismatch)
        if not self.load_options.placed:
            model = on_device(model, use_cpu=self.use_cpu)
        say_slow(model.device.type, bf16=self.bf16)
        with reduced(model, self.bf16):
            yield model, tokenizer


class WrittenFile(NamedTuple):
    """What a run wrote, and what an earlier one had written."""

    what: str
    rows: Sequence[Mapping[str, Any]]
    tokens: int
    seconds: float
    before: int

    def __str__(self) -> str:
        known = f" and {self.before} {self.what} written before" if self.before else ""
        ended = sum(row["ended"] for row in self.rows)
        speed = f"{self.tokens / self.seconds:.0f} per second"
        return f"{len(self.rows)} {self.what}, {self.tokens} tokens ({speed}){known}, {ended} ended"


def generate(model: CausalModel, prompts: Prompts, output: Path) -> WrittenFile:
    """Continue every prompt: one line {prompt, text, sample, seed, ...} per text.

    Raises:
        PEMError: a model, module or prompts that cannot be used.
    """

    def write(skip: int) -> Iterator[Batch]:
        with model.open() as opened:
            yield from sample_rows(prompts, *opened, skip)

    identity = {**prompts.identity(), "batch_size": prompts.batch_size}
    return _written(model, output, "texts", identity, write, lambda rows: rows)


def answer(
    model: CausalModel,
    examples: Sequence[Example],
    template: Template,
    search: BeamSearch,
    output: Path,
    *,
    batch_size: int | None = None,
    name: str = "instructions",
) -> WrittenFile:
    """Answer every instruction: one line {instruction, answer, ...} each, in their order.

    Raises:
        PEMError: a model, module or instructions that cannot be used.
    """

    def write(skip: int) -> Iterator[Batch]:
        with model.open() as (loaded, tokenizer):
            found = answer_batches(
                loaded, tokenizer, examples, template, search,
                batch_size=batch_size, name=name, skip=skip,
            )  # fmt: skip
            for batch in found:
                yield [[place, one._asdict()] for place, one in batch.items()]

    def ordered(pairs: Batch) -> Batch:  # the longest instructions were answered first
        return [row for _, row in sorted(pairs, key=lambda pair: pair[0])]

    identity = {
        **template.content(), "search": asdict(search), "batch_size": batch_size,
        "rows": [(e.text, e.text_pair, e.label, e.row_id) for e in examples],
    }  # fmt: skip
    return _written(model, output, "answers", identity, write, ordered)


def _written(
    model: CausalModel,
    output: Path,
    what: str,
    identity: Mapping[str, Any],
    write: Callable[[int], Iterator[Batch]],
    ordered: Callable[[Batch], Batch],
) -> WrittenFile:
    """Make what is left, put everything in order, and write the file at once."""
    key = keys.key_of(keys.complete({**model.identity(), **identity}))
    partial, began = partial_path(output), time.perf_counter()
    found, kept = resume(partial, key, write)
    seconds = time.perf_counter() - began
    before = sum(map(len, found[:kept]))
    new = ordered([row for batch in found[kept:] for row in batch])
    rows = ordered([row for batch in found for row in batch])
    json_lines.write(output, rows)
    partial.unlink(missing_ok=True)
    return WrittenFile(what, rows, sum(row["new_tokens"] for row in new), seconds, before)


def read(
    model: CausalModel,
    source: str,
    asked: Windows,
    *,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, float | str]:
    """Perplexity of a long text with its loss and standard errors, and how they were counted.

    Raises:
        PEMError: a text, model or module that cannot be used.
    """
    texts = read_texts(source)
    with model.open() as (loaded, tokenizer):
        windows = asked.readable(loaded.config, tokenizer)
        if windows.window != asked.window:
            say(
                f"--window {asked.window}: the model takes {windows.window} tokens; using windows "
                f"of {windows.window} every {windows.stride}"
            )
        evaluator = text_evaluator(
            texts, windows, tokenizer,
            max_tokens=max_tokens, batch_size=batch_size, device=loaded.device.type,
        )  # fmt: skip
        scores = perplexity(loaded, evaluator)
    return {
        **scores, "window": windows.window, "stride": windows.stride, "start_token": windows.start,
    }  # fmt: skip
