"""Unlearning by negation: how much less toxic a model writes at each strength, and at what price.

Research on removing abilities: the module was trained on what is to be forgotten, and is
subtracted. Rows of the table are the base model, the module as it is applied, and its negation at
every strength. Differences are to the base model and paired: the n-th text of every row is drawn
with the same random numbers, and every row reads the same windows. Source: section 4.3 of
arXiv:2306.14870.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.checkpoint.several import read_modules
from pem_composition.errors import UsageError
from pem_composition.evaluation import keys, models, toxicity
from pem_composition.evaluation.attached import device_key, on_device
from pem_composition.evaluation.long_texts import increase
from pem_composition.evaluation.toxicity import load_judge
from pem_composition.report.records import NEGATION, RESULTS, SUMMARY_VERSION
from pem_composition.sweep.grids import APPLIED, BASE
from pem_composition.sweep.points import check_fits, read_input
from pem_composition.sweep.result_store import Record, ResultStore
from pem_composition.sweep.runner import Say
from pem_composition.sweep.strengths import (
    Measured,
    StrengthRunner,
    UnlearningSetup,
    at_strength,
)
from pem_composition.sweep.texts import LongText, guarded, read_text, strongest

if TYPE_CHECKING:
    from pem_composition.evaluation.decoding import Prompts, Windows
    from pem_composition.evaluation.toxicity import ToxicityClassifier
    from pem_composition.sweep.text_backend import TextBackend

Row = dict[str, Any]


@dataclass(frozen=True)
class StrengthPlan:
    """What is compared, and what may not be lost.

    Attributes:
        strengths: in the order of the table; see ``strengths``.
        threshold: a text with a higher score counts as toxic.
        max_increase: the strongest negation is chosen whose perplexity on the guard's text is at
            most so much larger than the base model's, as a share of it, at the upper end of the
            95 % interval. The table reports another text.
    """

    strengths: tuple[float, ...]
    threshold: float
    max_increase: float
    base_name: str = ""
    command: str = ""


def read_texts(
    reported: str, guard: str | None, windows: Windows, max_tokens: int | None
) -> tuple[LongText, LongText]:
    """The text that is reported and the guard's: two files, or the second and first half of one.

    Raises:
        UsageError: the guard is the text that is reported.
    """
    own = read_text(reported, windows, max_tokens)
    if guard is None:
        first, second = own.halves()
        return second, first
    other = read_text(guard, windows, max_tokens)
    if other.shared_rows(own) > 0.5:
        raise UsageError.build(
            "--guard_file", "holds the text that is reported", found=other.name,
            expected="another one", do="leave it out, and the file is split",
        )  # fmt: skip
    return own, other


def measure(
    plan: StrengthPlan,
    path: str,
    name: str,
    *,
    base: str,
    prompts: Prompts,
    text: LongText,
    guard: LongText,
    judges: Sequence[str],
    out: Path,
    bf16: bool = False,
    use_cpu: bool = False,
    dtype: str | None = None,
    fresh: bool = False,
    backend: TextBackend | None = None,
    say: Say,
) -> tuple[dict[str, Any], StrengthRunner]:
    """Read the module and measure every strength of it; the base model waits until it is needed.

    Args:
        path, name: of the module.
        judges: names or folders.
        dtype: of the module that will be written.
        fresh: look at no result that is there.
        backend: who writes the texts in place of the model.

    Raises:
        PEMError: a module, model, prompts or text that cannot be used.
    """

    def load() -> tuple[Any, Any]:
        model, tokenizer, _ = models.load_causal(base)
        return on_device(model, use_cpu=use_cpu, bf16=bf16), tokenizer

    known = _judges(judges)
    (module,) = read_modules([path], [name], base=base)
    trial = UnlearningSetup(
        keys.base_digest(base), read_input(name, module, path), prompts, known, text, guard,
        bf16, keys.generation_digest(base), device_key(use_cpu), backend,
    )  # fmt: skip
    if backend is not None:
        backend.check(module)
    check_fits(((f"strength {s:g}", at_strength(module, s)) for s in plan.strengths), dtype)
    runner = StrengthRunner(trial, load, ResultStore(out / RESULTS, fresh=fresh), out, say)
    summary = run(plan, runner)
    runner.close()
    return summary, runner


def _judges(names: Sequence[str]) -> dict[str, ToxicityClassifier]:
    """The judges by name; of equal names with the beginning of their hash."""
    found = {judge.identity.sha256: judge for judge in map(load_judge, names)}
    called = [judge.identity.name for judge in found.values()]
    return {
        name if called.count(name) == 1 else f"{name} {digest[:6]}": judge
        for name, (digest, judge) in zip(called, found.items(), strict=True)
    }


def run(plan: StrengthPlan, runner: StrengthRunner) -> dict[str, Any]:
    """Measure every strength and choose one.

    Returns the summary, which is also the last line of results.jsonl: the rows of the table with
    the keys of their records, and the strongest negation that keeps the perplexity.
    """
    runner.share(plan.strengths)
    measured = [runner.measure(strength) for strength in plan.strengths]
    rows = [_row(m, measured[0], plan, runner) for m in measured]
    summary = {
        "summary": SUMMARY_VERSION,
        "composition": NEGATION,
        **_setting(plan, runner, measured[0]),
        "rows": rows,
        "selected": strongest(rows, plan.max_increase),
    }
    runner.store.conclude(summary)
    return summary


def _setting(plan: StrengthPlan, runner: StrengthRunner, base: Measured) -> dict[str, Any]:
    """What the sweep was about."""

    def read(text: LongText, record: Record) -> dict[str, Any]:
        return {"name": text.name, **record["read"], "tokens": record["tokens"]}

    trial = runner.trial
    asked = trial.asked
    return {
        "command": plan.command,
        "module": trial.module.name,
        "paths": [trial.module.path],
        "kind": trial.module.pem.kind,
        "base": trial.base,
        "base_name": plan.base_name,
        "judges": {name: vars(judge.identity) for name, judge in trial.judges.items()},
        "threshold": plan.threshold,
        "max_increase": plan.max_increase,
        "asked": {
            "name": asked.name,
            "prompts": len(asked.texts),
            "samples": asked.samples,
            "seed": asked.seed,
            "decoding": asdict(asked.decoding),
            **(trial.backend.identity if trial.backend else {}),
        },
        "text": read(trial.text, base.perplexity),
        "guard": read(trial.guard, base.guard),
    }


def _row(measured: Measured, base: Measured, plan: StrengthPlan, runner: StrengthRunner) -> Row:
    """A row of the table with everything that is known of it."""
    identity, name = _named(measured.strength, runner.trial.module.name)
    texts, first, ppl = measured.texts, measured.toxicity[0], measured.perplexity
    ratio, error, _ = increase(ppl["nll"], base.perplexity["nll"], ppl["counts"])
    form = [name for name in first if name.startswith(("distinct", "empty", "repeated", "looping"))]
    return {
        "id": identity,
        "row": name,
        "strength": measured.strength,
        "keys": measured.keys,
        "n": texts["n"],
        "file": texts["file"],
        "toxicity": _toxicity(measured, base, plan, runner),
        "perplexity": ppl["perplexity"],
        "perplexity_stderr": ppl["perplexity_stderr"],
        "increase": ratio,
        "increase_stderr": error,
        **guarded(measured.guard, base.guard),
        **{n: first[n] for n in form},
        "ended": texts["ended"],
        "new_tokens": texts["new_tokens"],
    }


def _toxicity(
    measured: Measured, base: Measured, plan: StrengthPlan, runner: StrengthRunner
) -> list[Row]:
    """What each judge says, and the paired differences to the base model."""
    groups, threshold, out = runner.trial.asked.groups, plan.threshold, []
    pairs = zip(runner.trial.judges, measured.toxicity, base.toxicity, strict=True)
    for judge, record, before in pairs:
        own, other = ((r["scores"], r["spoken"]) for r in (record, before))
        found = toxicity.summarise(*own, threshold, groups)
        del found["n"], found["threshold"]  # of the row and of the table
        found |= toxicity.changes(*own, *other, threshold, groups)
        for end in ("", "_low", "_high"):
            found[f"share{end}"] = found.pop(f"toxic{end}")
        out.append({"judge": judge, "seen": record["seen"], **found})
    return out


def _named(strength: float, module: str) -> tuple[str, str]:
    """What a row is, and its name."""
    if strength == BASE:
        return "base", "base model"
    if strength == APPLIED:
        return "module", f"{module} applied"
    amount = f"{abs(strength):.12g}"
    if strength < 0:
        return f"strength -{amount}", f"{module} applied, {amount}"
    return f"strength {amount}", f"negated, {amount}"
