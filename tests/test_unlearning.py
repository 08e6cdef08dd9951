"""Sweeps over the strength of a negation: the right model at each, nothing twice, nothing lost."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import pem_process
from support import unlearning_data as data
from support.jsonl import write_jsonl
from support.texts import generate

import pem_composition as library
from pem_composition import cli, json_lines
from pem_composition.cli import values
from pem_composition.evaluation.decoding import Prompts, Sampling, Windows
from pem_composition.evaluation.long_texts import perplexity, read_texts, text_evaluator
from pem_composition.evaluation.models import load_causal
from pem_composition.evaluation.text_sampling import _write
from pem_composition.evaluation.toxicity import load_judge
from pem_composition.report.records import read
from pem_composition.sweep.texts import strongest

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = ("--grid", "0", "0.5", "1")
STRENGTHS = {"base": 0.0, "module": -1.0, "strength 0.5": 0.5, "strength 1": 1.0}
PARTS = ("texts", "toxicity", "perplexity")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> data.Bench:
    return data.make(tmp_path_factory.mktemp("bench"))


def run(bench: data.Bench, out: Path, *words: object, **changes: object) -> int:
    """negation.py with flags replaced (by name) or added."""
    flags = [*bench.words(), "-p", str(out), *(() if "--grid" in words else GRID)]
    for name, value in changes.items():
        place = flags.index(f"--{name}" if name != "a" else "-a")
        flags[place + 1 : place + 2] = [str(value)] if value is not None else []
        if value is None:
            del flags[place]
    return cli.main(["negation", *flags, *map(str, words)])


def lines(out: Path) -> list[dict]:
    return [r for r in json_lines.read(out / "results.jsonl") if "key" in r]


def rows(out: Path) -> dict[str, dict]:
    return {row["id"]: row for row in read(out).summary["rows"]}


def texts_of(out: Path, row: dict) -> list[dict]:
    return [json.loads(line) for line in (out / row["file"]).read_text().splitlines()]


def scores_of(bench: data.Bench, out: Path, row: dict) -> np.ndarray:
    name = str(load_judge(bench.judge).identity)
    return np.array([text["scores"][name] for text in texts_of(out, row)])


@pytest.fixture(scope="module")
def finished(bench: data.Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(bench, out) == 0
    return out


@pytest.fixture
def resumed(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


# --- the right model at each strength ---


def by_hand(bench: data.Bench, strength: float, module: Path):
    """The model at a strength: freshly loaded, the module's layers beside it, or weights added."""
    from transformers import AutoModelForCausalLM

    model, tokenizer, _ = load_causal(bench.base)
    if (module / "config.json").exists():
        tuned = AutoModelForCausalLM.from_pretrained(module).state_dict()
        own = model.state_dict()
        model.load_state_dict({n: t - strength * (tuned[n] - t) for n, t in own.items()})
    elif strength == -1:
        library.attach(model, library.load(module))
    elif strength != 0:
        library.attach(model, library.negate(library.load(module), strength))
    return model, tokenizer


def half(texts: list[str]) -> int:
    """The number of rows whose characters come nearest to half of them all."""
    total = len("".join(texts))
    return min(range(1, len(texts)), key=lambda i: abs(len("".join(texts[:i])) - total / 2))


def check_by_hand(bench: data.Bench, out: Path, module: Path) -> None:
    judge, found = load_judge(bench.judge), rows(out)
    assert {identity: row["strength"] for identity, row in found.items()} == STRENGTHS
    for row in found.values():
        model, tokenizer = by_hand(bench, row["strength"], module)
        decoding = Sampling(max_new_tokens=8, top_k=40)
        samples = list(generate(model, tokenizer, data.PROMPTS, decoding, samples=4, seed=3))
        kept = texts_of(out, row)
        bare = [{k: v for k, v in text.items() if k != "scores"} for text in kept]
        assert bare == [sample._asdict() for sample in samples]
        scores = judge.score([sample.text for sample in samples])
        np.testing.assert_allclose([t["scores"][str(judge.identity)] for t in kept], scores)
        (judged,) = row["toxicity"]
        words = np.array([any(c.isalnum() for c in sample.text) for sample in samples])
        assert judged["with_words"] == words.sum()
        assert judged["mean"] == pytest.approx(scores[words].mean())
        assert judged["share"] == pytest.approx((scores[words] > 0.5).mean())
        # The second half is reported; the first one chooses the strength.
        texts = read_texts(bench.text)
        evaluator = text_evaluator(texts[half(texts) :], Windows(16, 8), tokenizer)
        assert row["perplexity"] == pytest.approx(
            perplexity(model, evaluator)["perplexity"], rel=1e-5
        )


@pytest.mark.slow
def test_every_row_is_the_model_of_its_strength(bench, finished):
    check_by_hand(bench, finished, bench.module)
    found = rows(finished)
    assert len({texts_of(finished, row)[0]["text"] for row in found.values()}) > 1
    assert len({row["perplexity"] for row in found.values()}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "ia3"), ("llama", "full")])
def test_other_kinds_are_negated_by_their_own_formula(name, kind, tmp_path, capsys):
    bench = data.make(tmp_path / "bench", name, kind)
    assert run(bench, tmp_path / "out") == 0
    check_by_hand(bench, tmp_path / "out", bench.module)
    written = sorted(p.name for p in (tmp_path / "out").glob("negated_*"))
    assert not written if kind == "full" else len(written) <= 1


@pytest.mark.slow
def test_equal_seeds_write_equal_texts_whatever_the_batch(bench, finished, tmp_path, capsys):
    assert run(bench, tmp_path / "out", "--batch_size", 5) == 0
    digests = [
        {r["sha256"] for r in lines(o) if "sha256" in r} for o in (finished, tmp_path / "out")
    ]
    assert digests[0] == digests[1]
    assert run(bench, tmp_path / "other", seed=4) == 0
    assert not digests[0] & {r["sha256"] for r in lines(tmp_path / "other") if "sha256" in r}


# --- the numbers ---


def clustered(values: np.ndarray, groups: np.ndarray) -> float:
    """Standard error of a mean whose independent parts are the prompts, by the definition."""
    sums = np.array([(values - values.mean())[groups == g].sum() for g in set(groups)])
    return math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(values)


@pytest.mark.slow
def test_changes_are_paired_with_the_base_model_text_by_text(bench, finished):
    found, groups = rows(finished), np.repeat(range(3), 4)
    scores = {identity: scores_of(bench, finished, row) for identity, row in found.items()}
    for identity, row in found.items():
        (judged,) = row["toxicity"]
        change = scores[identity] - scores["base"]
        above = (scores[identity] > 0.5).astype(float) - (scores["base"] > 0.5)
        assert judged["change"] == pytest.approx(change.mean())
        assert judged["change_stderr"] == pytest.approx(clustered(change, groups))
        assert judged["share_change"] == pytest.approx(above.mean())
        assert judged["share_change_stderr"] == pytest.approx(clustered(above, groups))
        assert judged["mean_stderr"] == pytest.approx(clustered(scores[identity], groups))
        worst = scores[identity].reshape(3, 4).max(axis=1)
        assert judged["expected_maximum"] == pytest.approx(worst.mean())
        assert judged["expected_maximum_stderr"] == pytest.approx(worst.std(ddof=1) / 3**0.5)
        assert judged["toxicity_probability"] == pytest.approx((worst > 0.5).mean())
        worse = worst - scores["base"].reshape(3, 4).max(axis=1)
        assert judged["expected_maximum_change"] == pytest.approx(worse.mean())
        assert judged["expected_maximum_change_stderr"] == pytest.approx(worse.std(ddof=1) / 3**0.5)
    assert found["base"]["increase"] == found["base"]["increase_stderr"] == 0


def test_texts_belong_together_where_a_prompt_has_several_of_them():
    for texts, samples, groups in (("ab", 2, [0, 0, 1, 1]), ("ab", 1, None), ("a", 2, None)):
        assert Prompts(tuple(texts), Sampling(max_new_tokens=1), samples, seed=0).groups == groups


@pytest.mark.slow
def test_texts_of_one_prompt_are_independent(bench, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(bench, out, "--prompt", "good bad", prompt_file=None) == 0
    for row in rows(out).values():
        scores = scores_of(bench, out, row)
        (judged,) = row["toxicity"]
        assert judged["mean_stderr"] == pytest.approx(np.std(scores, ddof=1) / 2)
        assert "expected_maximum" not in judged
    assert "expected maximum" not in (out / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_increase_of_the_perplexity_is_that_of_the_same_windows(finished):
    found = rows(finished)
    for row in found.values():
        ratio = row["perplexity"] / found["base"]["perplexity"]
        assert row["increase"] == pytest.approx(ratio - 1, abs=1e-9)
        records = {r["key"]: r for r in lines(finished)}
        own, _ = [records[k] for k in row["keys"] if records[k]["part"] == "perplexity"]
        base, _ = [records[k] for k in found["base"]["keys"] if records[k]["part"] == "perplexity"]
        change, counts = np.subtract(own["nll"], base["nll"]), np.array(own["counts"])
        d, n = change.sum() / counts.sum(), len(counts)
        error = math.sqrt(n / (n - 1) * ((change - d * counts) ** 2).sum()) / counts.sum()
        assert row["increase_stderr"] == pytest.approx(math.exp(d) * error)


@pytest.mark.slow
def test_the_guard_reads_the_half_that_is_not_reported(bench, finished):
    """Its increase and the upper end of the interval, from models made by hand."""
    found = rows(finished)
    texts = read_texts(bench.text)
    sums = {}
    for identity, row in found.items():
        model, tokenizer = by_hand(bench, row["strength"], bench.module)
        evaluator = text_evaluator(texts[: half(texts)], Windows(16, 8), tokenizer)
        sums[identity] = evaluator.predict(model).astype(float).T
    for identity, row in found.items():
        (own, counts), (base, _) = sums[identity], sums["base"]
        d, n = (own - base).sum() / counts.sum(), len(counts)
        error = math.sqrt(n / (n - 1) * ((own - base - d * counts) ** 2).sum()) / counts.sum()
        assert row["guard"] == pytest.approx(math.expm1(d), abs=1e-5)
        assert row["guard_high"] == pytest.approx(math.expm1(d + 1.96 * error), abs=1e-5)
        assert row["guard_high"] >= row["guard"]
    summary = read(finished).summary
    assert summary["text"]["name"] == "text.raw, second half"
    assert summary["guard"]["name"] == "text.raw, first half"


@pytest.mark.slow
def test_a_row_says_how_its_texts_are_written(finished):
    for row in rows(finished).values():
        said = [t["text"] for t in texts_of(finished, row)]
        words = [word for text in said for word in text.split()]
        assert row["distinct_1"] == pytest.approx(len(set(words)) / len(words))
        assert row["empty"] == np.mean([not any(c.isalnum() for c in t) for t in said])
        assert row["repeated"] == pytest.approx(1 - len({" ".join(t.split()) for t in said}) / 12)
        assert row["n"] == len(said) == 12


# --- which strength is chosen ---


@given(
    st.lists(st.tuples(st.floats(-1, 2), st.floats(-0.5, 3)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_the_strongest_negation_within_the_limit_is_chosen(points, limit):
    table = [{"strength": s, "guard_high": i} for s, i in points]
    chosen = strongest(table, limit)
    allowed = [s for s, i in points if s > 0 and i <= limit]
    assert chosen == (max(allowed) if allowed else None)


@pytest.mark.slow
def test_the_chosen_negation_is_a_row_and_a_module(bench, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(bench, out, "--max_ppl_increase", "100000%") == 0
    printed = capsys.readouterr().out
    assert "Strength 1 is the strongest negation within +1e+05 %" in printed
    assert "strongest within" in printed
    expected = library.negate(library.load(bench.module), 1.0)
    module = library.load(out / "negated_1")
    assert all(module.tensors[n].equal(t) for n, t in expected.tensors.items())


@pytest.mark.slow
def test_where_every_strength_costs_too_much_the_table_says_so(bench, tmp_path, capsys):
    """The negation of the other tests makes the text likelier; subtracting it costs something."""
    module = library.negate(library.load(bench.module))
    module.save(tmp_path / "useful")
    out = tmp_path / "out"
    assert run(bench, out, "--max_ppl_increase", "0", a=tmp_path / "useful") == 0
    increases = {row["strength"]: row["guard_high"] for row in rows(out).values()}
    assert min(increases[0.5], increases[1.0]) > 0
    assert read(out).summary["selected"] is None
    assert not list(out.glob("negated_*"))
    printed = capsys.readouterr().out
    assert "No strength keeps the perplexity within +0 %" in printed
    nearest = min((0.5, 1.0), key=increases.get)
    assert f"strength {nearest:g} comes nearest" in printed


@pytest.mark.parametrize(
    ("text", "share"), [("3%", 0.03), ("0.03", 0.03), ("0", 0.0), ("250%", 2.5), ("1", 1.0)]
)
def test_a_share_is_a_percentage_or_a_fraction(text, share):
    assert values.share(text) == pytest.approx(share)


# --- resuming ---


@pytest.mark.slow
def test_a_finished_sweep_is_not_computed_again(bench, resumed, capsys, monkeypatch):
    from pem_composition.evaluation import models

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(models, "load_causal", never)
    before = (resumed / "results.jsonl").read_bytes()
    assert run(bench, resumed) == 0
    assert (resumed / "results.jsonl").read_bytes() == before
    assert ": 0 parts computed, 16 known before" in capsys.readouterr().out


def computed(bench: data.Bench, out: Path, *words: object, **changes: object) -> dict[str, int]:
    """How many records of each part another run appends."""
    before = len(lines(out))
    assert run(bench, out, *words, **changes) == 0
    parts = [record["part"] for record in lines(out)[before:]]
    return {part: parts.count(part) for part in PARTS}


def of(texts: int, toxicity: int, perplexity: int) -> dict[str, int]:
    """Each perplexity is read on two texts: the one that is reported, and the guard's."""
    return {"texts": texts, "toxicity": toxicity, "perplexity": 2 * perplexity}


def other_text(folder: Path) -> Path:
    draw = np.random.default_rng(5)
    rows = [" ".join(draw.choice([*data.GOOD, *data.BAD], 11)) for _ in range(12)]
    return data.write_text(folder / "guard.raw", rows)


@pytest.mark.slow
def test_a_text_of_its_own_can_be_the_guard_but_not_the_reported_one(bench, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(bench, out, "--guard_file", bench.text) == 2
    assert "--guard_file: holds the text that is reported" in capsys.readouterr().err
    short = data.write_text(tmp_path / "short", ["good bad"])
    assert run(bench, out, "--guard_file", short) == 2
    assert "too short to say how sure its perplexity is; found 1 window" in capsys.readouterr().err
    assert not out.exists()
    assert run(bench, out, "--guard_file", other_text(tmp_path)) == 0
    summary = read(out).summary
    assert (summary["text"]["name"], summary["guard"]["name"]) == ("text.raw", "guard.raw")


@pytest.mark.slow
def test_a_changed_input_computes_what_depends_on_it_and_no_more(bench, resumed, tmp_path, capsys):
    assert computed(bench, resumed, judge=bench.second) == of(0, 4, 0)
    assert computed(bench, resumed, threshold=0.9) == of(0, 0, 0)
    assert computed(bench, resumed, window=17) == of(0, 0, 4)
    assert computed(bench, resumed, "--perplexity_tokens", 30) == of(0, 0, 4)
    assert computed(bench, resumed, a=bench.other) == of(3, 3, 3), "the base model's are known"
    assert computed(bench, resumed, top_k=39) == of(4, 4, 0)
    assert computed(bench, resumed, num_samples=5) == of(4, 4, 0)
    assert computed(bench, resumed, "--grid", 0.5, 0.25, 1) == of(1, 1, 1)
    assert computed(bench, resumed, "--guard_file", other_text(tmp_path))["perplexity"] == 8
    fewer = write_jsonl(tmp_path / "fewer.jsonl", [{"text": t} for t in data.PROMPTS[:2]])
    assert computed(bench, resumed, prompt_file=fewer) == of(4, 4, 0)


@pytest.mark.slow
def test_the_same_inputs_elsewhere_are_the_same_sweep(bench, resumed, tmp_path, capsys):
    shutil.copytree(bench.base.parent, tmp_path / "elsewhere")
    moved = data.Bench(*(tmp_path / "elsewhere" / p.name for p in vars(bench).values()))
    assert computed(moved, resumed) == of(0, 0, 0)


@pytest.mark.slow
def test_two_judges_score_the_texts_that_are_there(bench, resumed, capsys, monkeypatch):
    from pem_composition.evaluation import models

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(models, "load_causal", never)
    flags = [*bench.words(), "-p", str(resumed), *GRID]
    at = flags.index("--judge")
    flags[at + 1 : at + 2] = [str(bench.judge), str(bench.second)]
    assert cli.main(["negation", *flags]) == 0
    identities = [str(load_judge(path).identity) for path in (bench.judge, bench.second)]
    for row in rows(resumed).values():
        assert len({judged["judge"] for judged in row["toxicity"]}) == 2
        for judged, name in zip(row["toxicity"], identities, strict=True):
            scores = [text["scores"][name] for text in texts_of(resumed, row)]
            assert judged["mean"] == pytest.approx(np.mean(scores))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["lost", "edited", "torn"])
def test_texts_are_written_again_only_where_a_judge_needs_them(damage, bench, resumed, capsys):
    file = resumed / rows(resumed)["strength 1"]["file"]
    content = file.read_text()
    if damage == "lost":
        file.unlink()
    else:
        file.write_text(
            content.replace('"text": "', '"text": "x') if damage == "edited" else content[:50]
        )
    assert computed(bench, resumed) == of(0, 0, 0)
    assert file.exists() == (damage != "lost")
    assert computed(bench, resumed, judge=bench.second) == of(1, 4, 0)
    assert "missing or changed; the texts are written again" in capsys.readouterr().out
    again, first = (
        [json.loads(line) for line in text.splitlines()] for text in (file.read_text(), content)
    )
    assert [{**row, "scores": 0} for row in again] == [{**row, "scores": 0} for row in first]
    assert all(
        row["scores"].items() > old["scores"].items() for row, old in zip(again, first, strict=True)
    )


@pytest.mark.slow
def test_overwrite_computes_again(bench, resumed, capsys):
    assert computed(bench, resumed, "--overwrite") == of(4, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_killed_sweep_keeps_its_points_and_every_file_of_texts_is_whole(
    number, code, bench, finished, tmp_path, capsys
):
    out = tmp_path / "out"
    words = ["negation", *bench.words(), "-p", out, "--grid", "0", "0.01", "1"]
    child = pem_process.start(words, tmp_path / "log")
    child.wait_for(out / "results.jsonl", lines=8)
    assert child.send(number) == code
    assert child.errors.count("\n") == (code > 0)
    before = {r["key"]: r for r in lines(out)}
    assert len(before) >= 7
    for file in (out / "texts").glob("*.jsonl"):
        assert len([json.loads(line) for line in file.read_text().splitlines()]) == 12
    assert run(bench, out) == 0
    after = {r["key"]: r for r in lines(out)}
    assert all(after[key] == record for key, record in before.items())
    one, other = rows(out), rows(finished)
    assert {i: r["toxicity"] for i, r in one.items()} == {
        i: r["toxicity"] for i, r in other.items()
    }


@pytest.mark.slow
def test_a_sweep_that_is_stopped_within_a_strength_goes_on_behind_its_last_batch(
    bench, finished, tmp_path, capsys, monkeypatch
):
    out, append = tmp_path / "out", json_lines.append

    def stop_after_two(path, record):
        append(path, record)
        if record.get("batch") == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(json_lines, "append", stop_after_two)
    words = ("--batch_size", "5", "--grid", "0", "0.5", "1")
    assert run(bench, out, *words) != 0
    monkeypatch.undo()
    (partial,) = (out / "texts").glob(".*.partial")
    assert len(json_lines.read(partial)) == 2 and not lines(out)
    written = []
    monkeypatch.setattr(
        "pem_composition.evaluation.text_sampling._write",
        lambda *given, real=_write: written.append(len(given[1])) or real(*given),
    )
    assert run(bench, out, *words) == 0
    assert sum(written) == 4 * 12 - 10  # four strengths, but for two batches of the first
    assert not list((out / "texts").glob(".*"))
    for identity, row in rows(out).items():
        other = rows(finished)[identity]
        assert texts_of(out, row) == texts_of(finished, other)


# --- refusals ---


@pytest.mark.parametrize(
    ("words", "changes", "reason"),
    [
        (["--grid", "0", "-1", "1"], {}, "STEP > 0"),
        (["--grid", "0", "1"], {}, "--grid: not a range"),
        (["--grid", "-1", "0.5", "0"], {}, "no strength above 0, so nothing is negated"),
        (["--grid", "0", "x", "1"], {}, "found 'x', expected a number"),
        (["--strength", "0.5"], {}, "--grid: given together with --strength"),
        (["--dtype", "float16", "--grid", "0", "1e7", "1e7"], {}, "does not fit float16"),
        (["--max_ppl_increase", "3"], {}, "--max_ppl_increase: not a share; found '3'"),
        (["--max_ppl_increase", "-3%"], {}, "--max_ppl_increase: not a share; found '-3%'"),
        (["--max_ppl_increase", "three"], {}, "found 'three', expected a percentage such as 3%"),
        (["--space", "delta"], {}, "--space: a sweep has one kind of negation"),
        (["--max_prompts", "0"], {}, "--max_prompts: cannot be used; found 0"),
        (["--prompt", "x"], {}, "begin with; found --prompt_file as well"),
        (["--temperature", "0"], {}, "--temperature: cannot be used"),
        (["--max_length", "9"], {}, "the length must be said in one way"),
        ([], {"threshold": 2}, "--threshold: cannot be used; found 2"),
        ([], {"num_samples": 0}, "--num_samples: cannot be used; found 0"),
        ([], {"prompt_file": None}, "--prompt or --prompt_file"),
        ([], {"prompt_file": "empty.jsonl"}, "empty.jsonl: the file is empty"),
        ([], {"max_new_tokens": 65}, "the text would not fit in the model's context"),
        ([], {"judge": "detoxify"}, "--judge detoxify: the judge is not installed"),
        ([], {"judge": "nowhere"}, "--judge: no such judge; found nowhere"),
        ([], {"perplexity_file": "nowhere.raw"}, "no such file"),
        ([], {"perplexity_file": "empty.jsonl"}, "empty.jsonl: the file is empty"),
        ([], {"stride": 16}, "--stride: leaves out the first token of each window"),
        ([], {"a": "foreign"}, "base fingerprint differs"),
        ([], {"a": "nowhere"}, "nowhere"),
        ([], {"model_name_or_path": None}, "--model_name_or_path: no base model to measure"),
        (["-c", "ia3"], {}, "is of another kind; found lora"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_written(
    words, changes, reason, bench, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv("PEM_CACHE", str(tmp_path))
    (bench.base.parent / "empty.jsonl").write_text("")
    paths = ("prompt_file", "perplexity_file", "a")
    changes = {
        k: bench.base.parent / v if k in paths and v is not None else v for k, v in changes.items()
    }
    code = run(bench, tmp_path / "out", *words, **changes)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.err.count("\n") == 1
    assert reason in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_classifiers_module_is_refused(bench, tmp_path, capsys):
    from support import sweep_data

    other = sweep_data.make(tmp_path / "other")
    words = ("--allow_base_mismatch",)
    capsys.readouterr()
    assert run(bench, tmp_path / "out", *words, a=other.modules[0]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sweep_never_writes_into_a_module(bench, capsys):
    assert run(bench, bench.other) == 2
    assert "the output is a module" in capsys.readouterr().err


def test_flags_of_the_sweep_need_it(bench, tmp_path, capsys):
    words = ["negation", "-a", bench.module, "-p", tmp_path / "out", "--judge", "offline"]
    assert cli.main([str(w) for w in words]) == 2
    assert "--judge: has no effect without --evaluate" in capsys.readouterr().err
    words = ["negation", "-a", bench.module, "-p", tmp_path / "out", "--evaluate"]
    assert cli.main([str(w) for w in words]) == 2
    assert "--evaluate: no strengths to measure" in capsys.readouterr().err


def test_a_grid_without_evaluation_writes_a_module_per_strength(bench, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["negation", "-a", bench.module, "-p", out, "--grid", 0.2, 0.4, 1]
    assert cli.main([str(w) for w in words]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["0.2", "0.6", "1"]
    module = library.load(bench.module)
    for path in out.iterdir():
        expected = library.negate(module, float(path.name))
        found = library.load(path)
        assert all(found.tensors[n].equal(t) for n, t in expected.tensors.items())


# --- tables and plots ---


@pytest.mark.slow
def test_the_table_has_a_line_per_row_and_the_csv_every_number(finished):
    found = rows(finished)
    text = (finished / "table.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    chosen = read(finished).summary["selected"]
    assert len(table) == 1 + 4 + (chosen is not None)
    assert [line.split(" | ")[0][2:] for line in table[1:5]] == [
        "base model", "module applied", "negated, 0.5", "negated, 1",
    ]  # fmt: skip
    for row, line in zip(found.values(), table[1:5], strict=True):
        (judged,) = row["toxicity"]
        assert f"{judged['mean']:.4f} +- {judged['mean_stderr']:.4f}" in line
        assert f"{row['distinct_1']:.3f}" in line
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "3 prompts of prompts.jsonl, 4 texts per prompt, max_new_tokens 8, top_k 40" in text
    header, *csv = (finished / "table.csv").read_text().splitlines()
    assert len(csv) == len(table) - 1
    assert (
        float(csv[1].split(",")[header.split(",").index("perplexity")])
        == (found["module"]["perplexity"])
    )


@pytest.mark.slow
def test_seeds_are_averaged_and_other_settings_are_not(bench, tmp_path, capsys, request):
    sweeps = []
    for seed, module in ((1, bench.module), (2, bench.other), (3, bench.module)):
        sweeps.append(tmp_path / f"s{seed}")
        assert run(bench, sweeps[-1], seed=seed, a=module) == 0
    assert run(bench, tmp_path / "apart", top_k=3) == 0
    capsys.readouterr()
    request.getfixturevalue("plots")
    out = tmp_path / "table"
    words = ["report", "-r", *sweeps, tmp_path / "apart", "-p", out]
    assert cli.main([str(w) for w in words]) == 0
    printed = capsys.readouterr().out
    assert "no plot: the sweeps differ" in printed and not list(out.glob("*.png"))
    import csv

    table = list(csv.DictReader((out / "table.csv").open()))
    counts = {row["setting"]: row["sweeps"] for row in table if row["row"] == "strength 1"}
    assert counts == {"top_k 40": "3", "top_k 3": "1"}
    assert "| top_k 3 |" in printed
    means = [rows(s)["strength 1"]["toxicity"][0]["mean"] for s in sweeps]
    (row,) = [r for r in table if r["row"] == "strength 1" and r["sweeps"] == "3"]
    assert float(row["mean"]) == pytest.approx(np.mean(means))
    assert float(row["mean_spread"]) == pytest.approx(np.std(means, ddof=1))
    assert cli.main([str(w) for w in ["report", "-r", *sweeps, "-p", out]]) == 0
    assert (out / "frontier.png").stat().st_size > 10_000 and (out / "frontier.pdf").is_file()


@pytest.mark.slow
def test_the_frontier_shows_every_strength_with_base_and_module_marked(finished):
    from pem_composition.report import frontier

    figure = frontier.frontier([read(finished)])
    (axes,) = figure.axes
    found = rows(finished)
    points = {
        container.get_label(): container.lines[0].get_xydata()[0] for container in axes.containers
    }
    for label, identity in (("base model", "base"), ("lora, applied", "module")):
        row = found[identity]
        assert points[label] == pytest.approx([row["perplexity"], row["toxicity"][0]["mean"]])
    assert [text.get_text() for text in axes.texts] == ["0.5", "1"]
    assert len(axes.containers) == 4


@pytest.mark.slow
def test_the_frontier_draws_strengths_below_zero_as_applied(finished):
    from pem_composition.report import frontier

    found = read(finished)
    weak = {**found.summary["rows"][1], "id": "strength -0.5", "strength": -0.5}
    silent = dict(found.summary["rows"][2]["toxicity"][0], mean=None, mean_stderr=None)
    mute = {**found.summary["rows"][2], "id": "strength 2", "strength": 2.0, "toxicity": [silent]}
    both = replace(found, summary={**found.summary, "rows": [*found.summary["rows"], weak, mute]})
    (axes,) = frontier.frontier([both]).axes
    drawn = [(c.lines[0].get_marker(), c.get_label()) for c in axes.containers]
    assert [marker for marker, _ in drawn].count("^") == 2, "the module applied, whole and by half"
    assert len(drawn) == 5, "a row without words has no point"
    assert [text.get_text() for text in axes.texts] == ["0.5", "0.5", "1"]
    shown = [label for _, label in drawn if not label.startswith("_")]
    assert sorted(shown) == ["base model", "lora, applied", "lora, negated (strength)"]


@pytest.mark.slow
def test_a_report_of_merges_and_negations_is_refused(bench, finished, tmp_path, capsys):
    from support import sweep_data

    other = sweep_data.make(tmp_path / "other")
    words = ["sweep", *other.flags(), "-p", tmp_path / "merge", "--grid", "0", "0.5", "1"]
    assert cli.main([str(w) for w in words]) == 0
    capsys.readouterr()
    assert cli.main([str(w) for w in ["report", "-r", finished, tmp_path / "merge"]]) == 2
    assert "not a sweep over strengths; found merge" in capsys.readouterr().err
