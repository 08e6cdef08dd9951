"""Detoxified modules side by side, on several sets of instructions: one process, one model.

For every strength and form (``module.detoxify``), beside the base model, the instruction module and
the toxic one. What is measured of each set:

    toxicity      mean score of the answers by each judge, and the share above the threshold
    change        the same minus that of the instruction module, paired over the instructions
    ROUGE-L       of the answers against reference answers           (a proxy of helpfulness)
    perplexity    of the reference answers, given the instruction    (likewise)
                  and its change, paired
    refused, empty, looping, words

Scores are averaged over answers with words; ROUGE-L and perplexity over the rows that have a
reference answer. Both numbers stand in the table. The reference answers of toxic instructions are
toxic texts where the set has them (as the paper's test set does): there ROUGE-L and a low
perplexity say that the ability is still in.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pem_composition import json_lines
from pem_composition.arithmetic.comparison import projection
from pem_composition.arithmetic.methods.registry import REFERENCE_DETOXIFY, SIMPLE
from pem_composition.arithmetic.ranks import Rank
from pem_composition.checkpoint.several import read_modules
from pem_composition.errors import UsageError
from pem_composition.evaluation import keys, models, standard_errors, toxicity
from pem_composition.evaluation.attached import device_key, on_device
from pem_composition.evaluation.decoding import Windows
from pem_composition.evaluation.language import LanguageEvaluator
from pem_composition.evaluation.long_texts import increase, summary
from pem_composition.evaluation.overlap import rouge_l
from pem_composition.evaluation.precision import reduced
from pem_composition.evaluation.refusals import is_refusal
from pem_composition.evaluation.standard_errors import Estimate
from pem_composition.report.records import (
    BASELINE,
    DETOXIFICATION,
    RESULTS,
    SUMMARY_VERSION,
)
from pem_composition.sweep.points import Input, Point, Settings, alone, read_input
from pem_composition.sweep.result_store import Record, ResultStore
from pem_composition.sweep.runner import Runner, Say
from pem_composition.sweep.texts import TextRows, guarded, read_text, strongest
from pem_composition.sweep.written_answers import InstructionRows
from pem_composition.tasks.document_rows import LANGUAGE

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.evaluation.decoding import BeamSearch
    from pem_composition.evaluation.load_options import LoadOptions
    from pem_composition.evaluation.standard_errors import Estimate
    from pem_composition.evaluation.toxicity import ToxicityClassifier
    from pem_composition.module import PEM
    from pem_composition.sweep.text_backend import TextBackend
    from pem_composition.tasks.data import Example
    from pem_composition.tasks.instruction_rows import Template

UNSAFE = "contrast_"  # what the types of XSTest's unsafe prompts begin with
SPLIT, GUARD = "test", "guard"
EXACT, REFERENCE = "exact", "reference"
Line = dict[str, Any]


@dataclass(frozen=True, eq=False)
class FormAtStrength:
    """A row of the table: its name, and for a detoxified module form and strength."""

    name: str
    point: Point
    form: str | None = None
    strength: float | None = None


@dataclass(frozen=True, eq=False)
class ScoredForm:
    """A row's answers to one set of instructions, and what the judges say of them.

    Attributes:
        scores: judge -> score per answer, in the order of the set.
    """

    row: FormAtStrength
    rows: InstructionRows
    record: Record
    scores: Mapping[str, Sequence[float]]


def rows_of(
    instruction: Input,
    toxic: Input,
    strengths: Sequence[float],
    forms: Sequence[str],
    rank: Rank | None = None,
) -> list[FormAtStrength]:
    """The base model, the two modules, and every form at every strength.

    Args:
        rank: of the exact form; default: the sum of the ranks.
    """
    pair = (instruction, toxic)
    rows = [
        FormAtStrength("base model", Point((instruction,), (0.0,), "delta")),  # no update at all
        FormAtStrength(BASELINE, alone(instruction)),
        FormAtStrength("toxic module", alone(toxic)),
    ]
    for form in forms:
        for strength in strengths:
            coefficients = (1.0 + strength, -strength)
            if form == EXACT:
                point = Point(pair, coefficients, "delta", rank=rank)
            else:
                method = REFERENCE_DETOXIFY if form == REFERENCE else SIMPLE
                point = Point(pair, coefficients, "parameter", method)
            rows.append(FormAtStrength(f"{form} {strength:.12g}", point, form, strength))
    return rows


def sets_of(
    files: Sequence[tuple[str, Sequence[Example]]],
    template: Template,
    search: BeamSearch,
    *,
    max_seq_length: int = 512,
    batch_size: int | None = None,
    backend: TextBackend | None = None,
) -> list[InstructionRows]:
    """The sets of instructions; XSTest in two, as only refusals of its safe prompts are bad.

    Raises:
        UsageError: two sets of one name, or of names that name one file.
    """
    parts: list[tuple[str, Sequence[Example]]] = []
    for name, examples in files:
        if not any(map(_is_unsafe, examples)):
            parts.append((name, examples))
            continue
        for part, wanted in (("safe", False), ("unsafe", True)):
            if own := [e for e in examples if _is_unsafe(e) == wanted]:
                parts.append((f"{name}, {part}", own))
    given = [name for name, _ in files]
    written = [_file_name(name) for name, _ in parts]
    if len(set(given)) < len(given) or len(set(written)) < len(written):
        raise UsageError.build(
            "--set_name", "two sets of one name", found=" ".join(given),
            expected="names that differ in letters, digits, - or _", do="name them",
        )  # fmt: skip
    return [
        InstructionRows(
            name, examples, template, search,
            max_seq_length=max_seq_length, batch_size=batch_size, backend=backend,
        )
        for name, examples in parts
    ]  # fmt: skip


def _is_unsafe(example: Example) -> bool:
    return str(example.row.get("type")).startswith(UNSAFE)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name) + ".jsonl"


def guard_of(path: str | None, max_tokens: int | None) -> TextRows | None:
    """The text by which a strength is chosen, in the windows of its own defaults."""
    return TextRows(read_text(path, Windows(), max_tokens), least=2) if path is not None else None


@dataclass(frozen=True)
class TablePlan:
    """How answers are told.

    Attributes:
        threshold: a score above it is toxic.
        max_increase: what a strength may cost on the guard's text.
        base_name: of the base model, ``command`` of the call.
    """

    threshold: float
    max_increase: float
    base_name: str
    command: str


@dataclass(frozen=True, eq=False)
class Detoxified:
    """What every row of the table answered, and the summary that is the last of the results."""

    scored: Sequence[ScoredForm]
    summary: dict[str, Any]
    store: ResultStore
    told: str

    def write_answers(self, out: Path) -> None:
        """OUT/answers/<module>/<set>.jsonl."""
        for one in self.scored:
            folder = out / "answers" / one.row.name.replace(" ", "-")
            json_lines.write(folder / _file_name(one.rows.name), answer_lines(one))


def measure(
    plan: TablePlan,
    headers: Sequence[ModuleHeader],
    *,
    base: str,
    strengths: Sequence[float],
    forms: Sequence[str],
    rank: Rank | None,
    sets: Sequence[InstructionRows],
    judges: Mapping[str, ToxicityClassifier],
    guard: TextRows | None,
    load_options: LoadOptions,
    bf16: bool,
    use_cpu: bool,
    out: Path,
    fresh: bool,
    say: Say,
) -> Detoxified:
    """Let every form and strength answer; answers in results.jsonl are not written again.

    Args:
        plan: how answers are told.
        headers: of the instruction module and the toxic one.
        base: folder or hub name of the base model, ``load_options`` how its weights are held.
        fresh: look at no result that is there.

    Raises:
        PEMError: modules, instructions or a model that cannot be used.
    """

    def load() -> tuple[Any, Any]:
        model, tokenizer, _ = models.load_causal(base, load_options=load_options)
        if not load_options.placed:
            model = on_device(model, use_cpu=use_cpu, bf16=bf16)
        for backend in backends:
            with reduced(model, bf16):
                backend.prepare(model, tokenizer)
        return model, tokenizer

    backends = {s.backend for s in sets if s.backend is not None}
    modules = read_modules(headers, [header.name for header in headers])
    for backend, module in itertools.product(backends, modules):
        backend.check(module)
    inputs = [
        read_input(header.name, module, str(header.path))
        for header, module in zip(headers, modules, strict=True)
    ]
    bits = f"{load_options.bits} bits" if load_options.bits else ""
    weights = " ".join(w for w in (bits, load_options.dtype or "") if w and w != "float32")
    settings = Settings(
        base=keys.base_digest(base), head="first", bf16=bf16, weights=weights,
        generation=keys.generation_digest(base), device=device_key(use_cpu),
    )  # fmt: skip
    rows = rows_of(inputs[0], inputs[1], strengths, forms, rank)
    splits: dict[str, Sequence[Any]] = {SPLIT: sets, **({GUARD: [guard]} if guard else {})}
    runner = Runner(load, splits, settings, ResultStore(out / RESULTS, fresh=fresh), say)
    scored = run(rows, runner, sets, judges)
    costs = guard_costs(rows, runner) if guard else {}
    runner.close()
    runner.store.gather()
    facts = {
        row.name: {"projection": _projection(row, settings, *modules), **costs.get(row.name, {})}
        for row in rows
    }
    summary = {
        "summary": SUMMARY_VERSION,
        "composition": DETOXIFICATION,
        "command": plan.command,
        "modules": [header.name for header in headers],
        "paths": [str(header.path) for header in headers],
        "kind": headers[0].kind,
        "base": settings.base,
        "base_name": plan.base_name,
        "weights": weights,
        "bf16": bf16,
        "rank": rank,
        "judges": {name: vars(judge.identity) for name, judge in judges.items()},
        "threshold": plan.threshold,
        "max_increase": plan.max_increase,
        "asked": [part.identity for part in sets],
        "guard": guard and {"name": guard.name, **guard.identity},
        "rows": _rows(rows, scored, facts, plan.threshold),
        "selected": _selected(rows, costs, plan.max_increase) if guard else None,
    }
    return Detoxified(scored, summary, runner.store, runner.told("sets answered"))


def _projection(
    row: FormAtStrength, settings: Settings, instruction: PEM, toxic: PEM
) -> float | None:
    """How far the row's module goes the way of the toxic training."""
    module = row.point.module(settings)
    return None if module is None else projection(module, instruction, toxic)


def _rows(
    rows: Sequence[FormAtStrength],
    scored: Sequence[ScoredForm],
    facts: Mapping[str, Mapping[str, float | None]],
    threshold: float,
) -> list[dict[str, Any]]:
    """Rows of the table with the keys of their answers; a line per set and judge.

    Args:
        facts: what is known of a row whatever it is asked, by its name.
    """
    first = {s.rows.name: s for s in scored if s.row.name == BASELINE}
    told = []
    for row in rows:
        own = [one for one in scored if one.row is row]
        lines = [line for one in own for line in _lines(one, first[one.rows.name], threshold)]
        told.append(
            {
                "row": row.name,
                "form": row.form,
                "strength": row.strength,
                "keys": [one.record["key"] for one in own],
                "lines": [{**line, **facts[row.name]} for line in lines],
            }
        )
    return told


def _selected(
    rows: Sequence[FormAtStrength], costs: Mapping[str, Mapping[str, float]], max_increase: float
) -> dict[str, float | None]:
    """For each form the strongest strength within the limit, see ``strongest``."""
    forms = dict.fromkeys(row.form for row in rows if row.form)
    return {
        form: strongest(
            [{**costs[row.name], "strength": row.strength} for row in rows if row.form == form],
            max_increase,
        )
        for form in forms
    }


def run(
    rows: Sequence[FormAtStrength],
    runner: Runner,
    sets: Sequence[InstructionRows],
    judges: Mapping[str, ToxicityClassifier],
) -> list[ScoredForm]:
    """Answers of every row to every set, from the store, or computed, judged."""
    found = []
    runner.share((row.point, SPLIT) for row in rows)
    for row in rows:
        for part, record in zip(sets, runner.score(row.point, SPLIT), strict=True):
            scores = {n: judge.score(record["answer"]).tolist() for n, judge in judges.items()}
            found.append(ScoredForm(row, part, record, scores))
    return found


def guard_costs(rows: Sequence[FormAtStrength], runner: Runner) -> dict[str, dict[str, float]]:
    """What every row costs in perplexity on the guard's text, against the instruction module."""
    records = {row.name: runner.score(row.point, GUARD)[0] for row in rows}
    return {name: guarded(record, records[BASELINE]) for name, record in records.items()}


def answer_lines(scored: ScoredForm) -> list[Line]:
    """Every answer with its instruction and its scores, as lines of JSON."""
    record = scored.record
    return [
        {
            "row": example.row_id,
            "instruction": example.text,
            "input": example.text_pair,
            "answer": record["answer"][i],
            "reference": example.label,
            "text": record["text"][i],
            "new_tokens": record["new_tokens"][i],
            "ended": record["ended"][i],
            **{f"toxicity_{name}": values[i] for name, values in scored.scores.items()},
        }
        for i, example in enumerate(scored.rows.examples)
    ]


def _lines(scored: ScoredForm, baseline: ScoredForm, threshold: float) -> list[Line]:
    answers, before = scored.record["answer"], baseline.record["answer"]
    spoken = toxicity.spoken(answers), toxicity.spoken(before)
    shared = {
        "set": scored.rows.name,
        "module": scored.row.name,
        "form": scored.row.form,
        "strength": scored.row.strength,
        **_quality(scored, baseline),
        **toxicity.form(answers),
    }
    lines = []
    for name, scores in scored.scores.items():
        found = toxicity.summarise(scores, spoken[0], threshold)
        found |= toxicity.changes(scores, spoken[0], baseline.scores[name], spoken[1], threshold)
        del found["threshold"]
        for end in ("", "_stderr"):
            found[f"toxicity{end}"] = found.pop(f"mean{end}")
        for end in ("", "_low", "_high"):
            found[f"toxic_share{end}"] = found.pop(f"toxic{end}")
        lines.append({**shared, "judge": name, **found})
    return lines


def _quality(scored: ScoredForm, baseline: ScoredForm) -> Line:
    """Proxies of helpfulness over the rows with reference answers, and refusals over all."""
    answers, referenced = scored.record["answer"], scored.rows.referenced
    references = [str(scored.rows.examples[i].label) for i in referenced]

    def overlaps(record: Record) -> list[float]:
        own = (record["answer"][i] for i in referenced)
        return [rouge_l(a, r) for a, r in zip(own, references, strict=True)]

    own, before = overlaps(scored.record), overlaps(baseline.record)
    return {
        "references": len(references),
        **standard_errors.flat(
            rouge_l=standard_errors.mean(own),
            rouge_l_change=standard_errors.mean([a - b for a, b in zip(own, before, strict=True)]),
            **_perplexity(scored.record["nll"], baseline.record["nll"]),
            refused=standard_errors.share([is_refusal(answer) for answer in answers]),
        ),
        "words": sum(len(answer.split()) for answer in answers) / len(answers),
    }


def _perplexity(
    nll: Sequence[Sequence[float]] | None, before: Sequence[Sequence[float]] | None
) -> dict[str, Estimate]:
    """Of all reference answers together, from sums per answer (n, 2); and its increase, paired."""
    if nll is None or before is None:
        return dict.fromkeys(("perplexity", "increase"), Estimate(None, None))

    outputs = np.asarray(nll, np.float32)
    found = summary(LanguageEvaluator(LANGUAGE, ()), outputs)
    sums, counts = outputs.T
    return {
        "perplexity": Estimate(found["perplexity"], found["perplexity_stderr"]),
        "increase": Estimate(*increase(sums, np.asarray(before, np.float32)[:, 0], counts)[:2]),
    }
