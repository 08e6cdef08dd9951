"""One model at one strength of a negation after another: what it writes, how well it still reads.

Strength s makes the weights base - s module: 0 is the base model, -1 the module as it is applied.
Each of three parts is a line of results.jsonl of its own, under a key made of content, so that
another judge scores the texts that are there, and another text is read without writing any:

    texts        module, strength, base with its generation_config.json,
                 prompts, decoding, seed, the engine that writes    the file, by its sha256
    toxicity     the texts, the judge                               a score per text, their form
    perplexity   module, strength, base, text, windows              log-likelihoods of the windows
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import launch, progress
from pem_composition.adapters import check_fold
from pem_composition.evaluation.keys import complete, digest_of, key_of
from pem_composition.evaluation.precision import reduced
from pem_composition.evaluation.resumable import partial_path, resume
from pem_composition.evaluation.text_sampling import encode_prompts, sample_rows
from pem_composition.evaluation.toxicity import Identity, form, spoken, summarise
from pem_composition.module import negate
from pem_composition.sweep import texts
from pem_composition.sweep.grids import APPLIED, BASE
from pem_composition.sweep.loaded import LoadedModel, Loader
from pem_composition.sweep.points import Input
from pem_composition.sweep.result_store import Record, ResultStore, finite
from pem_composition.sweep.runner import Say
from pem_composition.sweep.texts import LongText, Row, TextRows

if TYPE_CHECKING:
    from pem_composition.evaluation.decoding import Prompts
    from pem_composition.evaluation.text_sampling import Write
    from pem_composition.evaluation.toxicity import ToxicityClassifier
    from pem_composition.module import PEM
    from pem_composition.sweep.text_backend import TextBackend

FOLDER = "texts"
SPOKEN = 60.0  # seconds between two lines of progress within a part


@dataclass(frozen=True, eq=False)
class UnlearningSetup:
    """What every strength is put through.

    Attributes:
        base: digest of the base model, or its name where no file can be read.
        judges: by the name that a report gives them, each another one.
        text: whose perplexity is reported.
        guard: another one, whose perplexity decides which strength is chosen.
        generation: digest of how the model's texts end by default.
        device: the kind of device, if no CPU.
        backend: who writes the texts; None: the model that is loaded here.
    """

    base: str
    module: Input
    asked: Prompts
    judges: Mapping[str, ToxicityClassifier]
    text: LongText
    guard: LongText
    bf16: bool = False
    generation: str | None = None
    device: str = ""
    backend: TextBackend | None = None


@dataclass(frozen=True)
class Measured:
    """The records of one strength; ``toxicity`` has one for each judge."""

    strength: float
    texts: Record
    toxicity: tuple[Record, ...]
    perplexity: Record
    guard: Record

    @property
    def keys(self) -> list[str]:
        """Keys of all records."""
        return [r["key"] for r in (self.texts, *self.toxicity, self.perplexity, self.guard)]


class StrengthRunner:
    """A model and a store: measures strengths, each part of each at most once.

    Args:
        load: gives model and tokenizer; called when the first part has to be computed.
        folder: where the files of texts go.
    """

    def __init__(
        self, trial: UnlearningSetup, load: Loader, store: ResultStore, folder: Path, say: Say
    ) -> None:
        self.trial, self.store, self.folder, self.say = trial, store, folder, say
        self._held = LoadedModel(load, self._prepare, beside=trial.bf16)
        self._read = {"text": TextRows(trial.text), "guard": TextRows(trial.guard, least=2)}
        self._strength: float | None = None  # that of the weights

    def measure(self, strength: float) -> Measured:
        """Every part of one strength, from the store, or computed and appended."""
        measured = self._measure(strength, wait=True)
        assert measured is not None, "it waited"
        return measured

    def share(self, strengths: Sequence[float]) -> None:
        """Compute what is not known and no other process is at; ``measure`` waits for the rest."""
        for strength in progress.over(launch.own_first(strengths), "strengths"):
            self._measure(strength, wait=False)

    def _measure(self, strength: float, *, wait: bool) -> Measured | None:
        began, before = time.perf_counter(), self.store.computed
        written = self._texts(strength, wait)
        if written is None:
            return None
        scored = [self._toxicity(written, name, wait) for name in self.trial.judges]
        read = [self._perplexity(strength, rows, wait) for rows in self._read.values()]
        judged = tuple(record for record in scored if record is not None)
        text, guard = read
        if text is None or guard is None or len(judged) < len(scored):
            return None
        found = Measured(strength, written, judged, text, guard)
        if self.store.computed > before:
            self.say(self._line(found, time.perf_counter() - began))
        return found

    def close(self) -> None:
        """Give the base model its own weights back."""
        self._held.close()
        self._strength = None

    def module(self, strength: float) -> PEM:
        """What is put into the weights at a strength, as a module."""
        found = at_strength(self.trial.module.pem, strength)
        assert found is not None, "at strength 0 there is none"
        return found

    # --- the parts ---

    def _texts(self, strength: float, wait: bool) -> Record | None:
        identity = {**self._weights(strength), **self.trial.asked.identity()}
        if self.trial.generation is not None:
            identity["generation"] = self.trial.generation
        if self.trial.backend is not None:
            identity |= self.trial.backend.identity

        def compute(key: str) -> dict[str, Any]:
            file = f"{FOLDER}/{label(strength)}-{key[:12]}.jsonl"
            path = self.folder / file
            partial = partial_path(path)
            # The batches of another size are made of other rows.
            name = f"{key} {self.trial.asked.batch_size}"
            found, _ = resume(
                partial, name, lambda skip: self._written(strength, skip), self.trial.asked.size
            )
            rows = [row for batch in found for row in batch]
            facts = _facts(rows)
            texts.save(path, rows, self._scores(facts["sha256"]))
            partial.unlink(missing_ok=True)
            return {"file": file, **facts}

        return self.store.once(
            decided("texts", identity), compute, wait=wait, ready=self._ready_to_write,
            usable=self._at_hand,
        )  # fmt: skip

    def _at_hand(self, written: Record) -> bool:
        """True if every judge has scored the texts, or can: a lost file is written again then."""
        asked = (decided("toxicity", self._judged(written, n)) for n in self.trial.judges)
        keys = (key_of(complete(identity)) for identity in asked)
        if all(key in self.store.records for key in keys):
            return True
        path = self.folder / written["file"]
        if texts.read(path, written["sha256"]) is not None:
            return True
        self.say(f"{path}: missing or changed; the texts are written again")
        return False

    def _toxicity(self, written: Record, name: str, wait: bool) -> Record | None:
        judge = self.trial.judges[name]

        def compute(_key: str) -> dict[str, Any]:
            path = self.folder / written["file"]
            rows = texts.read(path, written["sha256"])
            assert rows is not None, "at hand, or just written"
            said = [row["text"] for row in rows]
            scores, seen = judge.score(said).tolist(), judge.seen(said)
            known = self._scores(written["sha256"]) | {str(judge.identity): scores}
            texts.save(path, rows, known)
            trained_on = None if seen is None else int(seen.sum())
            return {"scores": scores, "spoken": spoken(said), "seen": trained_on, **form(said)}

        return self.store.once(decided("toxicity", self._judged(written, name)), compute, wait=wait)

    def _judged(self, written: Record, name: str) -> dict[str, Any]:
        """What decides the scores of texts: neither the model nor the prompts."""
        return {"texts": written["sha256"], "judge": vars(self.trial.judges[name].identity)}

    def _scores(self, sha256: str) -> dict[str, list[float]]:
        """What judges have said of these texts, by judge."""
        records = [r for r in self.store.records.values() if r.get("texts") == sha256]
        return {str(Identity(**r["judge"])): r["scores"] for r in records}

    def _perplexity(self, strength: float, rows: TextRows, wait: bool) -> Record | None:
        identity = {**self._weights(strength), **rows.text.identity()}

        def compute(_key: str) -> dict[str, Any]:
            with self._model(strength) as (model, _):
                return rows.evaluate(model)

        return self.store.once(
            decided("perplexity", identity), compute, wait=wait, ready=self._held.open,
            usable=lambda r: finite(r, "perplexity"),
        )  # fmt: skip

    def _weights(self, strength: float) -> dict[str, Any]:
        """What decides the weights; those of the base model are the same for every module."""
        module = None if strength == BASE else self.trial.module.sha256
        identity = {"base": self.trial.base, "module": module, "strength": strength}
        optional = {name: getattr(self.trial, name) for name in ("bf16", "device")}
        return identity | {name: value for name, value in optional.items() if value}

    # --- the model ---

    def _prepare(self, model: Any, tokenizer: Any) -> None:
        """Refuse a module, prompts or a text that this model cannot take, before any result."""
        check_fold(model, self.trial.module.pem)
        asked = self.trial.asked
        encode_prompts(model, tokenizer, asked.texts, asked.decoding)
        for rows in self._read.values():
            rows.prepare(model, tokenizer)
        if self.trial.backend is not None:
            with reduced(model, self.trial.bf16):
                self.trial.backend.prepare(model, tokenizer)

    def _ready_to_write(self) -> None:
        """Open the model, and see that the backend has the same base."""
        self._held.open()
        if self.trial.backend is not None:
            self.trial.backend.connect()

    @contextmanager
    def _model(self, strength: float) -> Iterator[tuple[Any, Any]]:
        """Model and tokenizer with the weights of this strength."""
        model, tokenizer = self._held.open()
        if self._strength != strength:
            self._held.put(at_strength(self.trial.module.pem, strength))
            self._strength = strength
        with reduced(model, self.trial.bf16):
            yield model, tokenizer

    def _written(self, strength: float, skip: int) -> Iterator[list[Row]]:
        """New texts in batches, all but the first ``skip``; long parts say how far they are."""
        asked, spoken, count = self.trial.asked, time.monotonic(), 0
        with self._model(strength) as opened, self._writing(strength, *opened) as write:
            for rows in sample_rows(asked, *opened, skip, write):
                yield rows
                count += len(rows)
                if time.monotonic() - spoken > SPOKEN:
                    spoken = time.monotonic()
                    self.say(f"strength {strength:g}: {count} texts of {asked.size} written now")

    def _writing(
        self, strength: float, model: Any, tokenizer: Any
    ) -> AbstractContextManager[Write | None]:
        """Who writes in place of the model, with the weights of this strength; None: nobody."""
        trial = self.trial
        if trial.backend is None:
            return nullcontext()
        module = at_strength(trial.module.pem, strength)
        return trial.backend.writing(module, label(strength), model, tokenizer, trial.asked)

    def _line(self, measured: Measured, seconds: float) -> str:
        """Progress of one strength."""
        parts = []
        for name, record in zip(self.trial.judges, measured.toxicity, strict=True):
            found = summarise(record["scores"], record["spoken"])
            mean = "of no text" if found["mean"] is None else f"{found['mean']:.4f}"
            parts.append(f"toxicity {mean} ({name})")
        first = measured.toxicity[0]
        parts.append(f"perplexity {measured.perplexity['perplexity']:.4g}")
        parts += [f"{first[name]:.0%} {name}" for name in ("empty", "repeated", "looping")]
        return f"strength {measured.strength:g}: {', '.join(parts)}  ({seconds:.1f} s)"


def at_strength(module: PEM, strength: float) -> PEM | None:
    """What is put into the base weights: -strength module; None for the base model itself."""
    if strength == BASE:
        return None
    return module if strength == APPLIED else negate(module, strength)


def label(strength: float) -> str:
    """What a strength is called in the name of a file."""
    return {BASE: "base", APPLIED: "module"}.get(strength, f"strength_{strength:g}")


def decided(part: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the result of a part."""
    return {"part": part, **identity}


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    """What a record says of its texts."""
    return {
        "sha256": digest_of(rows),
        "n": len(rows),
        "new_tokens": sum(row["new_tokens"] for row in rows) / len(rows),
        "ended": sum(row["ended"] for row in rows) / len(rows),
    }
