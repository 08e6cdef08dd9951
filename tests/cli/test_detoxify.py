"""``pem detoxify``: one module, or a table of all forms and strengths, checked against by hand."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.jsonl import read_jsonl, write_jsonl
from support.judges import write_judge
from support.texts import answers as answers_of
from support.tiny_models import random_module, tiny, write_causal

import pem_composition as library
from pem_composition import checkpoint, json_lines
from pem_composition.arithmetic.comparison import projection
from pem_composition.checkpoint import base_identity
from pem_composition.errors import Preempted
from pem_composition.evaluation import beams
from pem_composition.evaluation.decoding import BeamSearch, Windows
from pem_composition.evaluation.long_texts import read_texts, text_evaluator
from pem_composition.evaluation.models import load_causal
from pem_composition.evaluation.overlap import rouge_l
from pem_composition.evaluation.toxicity import load_judge
from pem_composition.sweep import detoxification
from pem_composition.sweep.points import Input
from pem_composition.tasks.data import Example
from pem_composition.tasks.instruction_rows import examples_of, get_template
from pem_composition.tasks.tables import read_table

S = (0.1234567, 0.12345678)
WORDS = ["good", "fine", "great", "nice", "bad", "poor", "awful", "sad"]


class Bench:
    """A tiny Llama, two modules of each kind, two sets of instructions, a judge."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Enough words that the tokenizer knows every token that the model can write.
        more = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]
        self.base = write_causal(folder / "base", "llama", [" ".join(WORDS * 9 + more)])
        identity = base_identity(self.base)
        for kind in ("lora", "ia3"):
            for seed, name in ((1, "own"), (2, "toxic")):
                module = replace(random_module(tiny("llama"), kind, seed=seed), base=identity)
                checkpoint.save(module, folder / f"{name}-{kind}")
        rows = [{"instruction": f"{w} fine", "output": f"{w} {w} sad"} for w in WORDS[:5]]
        self.asked = write_jsonl(folder / "asked.jsonl", rows)
        kinds = ["homonyms", "contrast_homonyms", "figurative"]
        prompts = [{"prompt": w, "type": k} for w, k in zip(WORDS, kinds, strict=False)]
        self.xstest = write_jsonl(folder / "xstest.jsonl", prompts)
        template = {"with_input": "{instruction} {input} ", "without_input": "{instruction} "}
        self.template = folder / "t.json"
        self.template.write_text(json.dumps(template | {"stop": ["sad"]}))
        self.judge = write_judge(folder, "bad poor awful sad", "good fine great nice")

    def modules(self, kind: str = "lora") -> tuple[str, Path, Path]:
        return "-a", self.folder / f"own-{kind}", self.folder / f"toxic-{kind}"

    def table(
        self, out: Path, *flags: object, kind: str = "lora", sets: tuple[Path, ...] = ()
    ) -> tuple[object, ...]:
        """Flags of a table at two strengths."""
        return (
            *self.modules(kind), "-p", out, "--evaluate", "--strength", 0.3, 1,
            "--model_name_or_path", self.base,
            "--instruction_file", *(sets or (self.asked, self.xstest)),
            "--template", self.template, "--judge", self.judge, "--num_beams", 2,
            "--max_new_tokens", 5, "--repetition_penalty", 1.2, "--threshold", 0.5, *flags,
        )  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("detoxify"))


@pytest.mark.parametrize(
    ("form", "flags"),
    [("exact", ()), ("exact", ("--rank", 3)), ("parameter", ()), ("reference", ())],
)
def test_one_module_is_written_as_the_library_makes_it(pem, bench, tmp_path, form, flags):
    argv = (*bench.modules(), "-p", tmp_path / "out", "--strength", 0.3, *flags)
    done = pem("detoxify", *argv, *(("--form", form) if form != "exact" else ()))
    assert done.code == 0 and "error against sum c_i dW_i" in done.out, done.err
    own, toxic = (library.load(path) for path in bench.modules()[1:])
    way = projection(library.load(tmp_path / "out"), own, toxic)
    assert f"{way:+.2f} of the toxic update" in done.out
    rank = flags[1] if flags else None
    expected = library.detoxify(own, toxic, 0.3, form=form, rank=rank)
    found = library.load(tmp_path / "out")
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=0)
    record = json.loads((tmp_path / "out" / "pem.json").read_text())
    assert record["space"] == ("delta" if form == "exact" else "parameter")
    again = pem("detoxify", *argv)
    assert again.code == 2 and "the output exists" in again.err


@pytest.mark.slow
def test_the_table_is_what_each_module_answers_alone(pem, bench, tmp_path, one_thread):
    out = tmp_path / "table"
    done = pem("detoxify", *bench.table(out))
    assert done.code == 0, done.err
    assert "27 sets answered, 0 known before" in done.out
    rows = list(csv.DictReader((out / "table.csv").open()))
    own, toxic = (library.load(path) for path in bench.modules()[1:])
    names = {"base model": None, "instruction module": own, "toxic module": toxic}
    for form in ("exact", "parameter", "reference"):
        for s in (0.3, 1):
            names[f"{form} {s:g}"] = library.detoxify(own, toxic, s, form=form)
    sets = ["asked", "xstest, safe", "xstest, unsafe"]
    assert [(r["module"], r["set"]) for r in rows] == [(n, s) for n in names for s in sets]
    template, search = get_template(str(bench.template)), BeamSearch(2, 1.2, 5)
    examples = examples_of(read_table(bench.asked))
    judge = load_judge(bench.judge)
    baseline = None
    for name, module in names.items():
        model, tokenizer, _ = load_causal(bench.base)
        if module is not None:
            library.attach(model, module)
        answers = answers_of(model, tokenizer, examples, template, search)
        texts = [answer.answer for answer in answers]
        folder = out / "answers" / name.replace(" ", "-")
        written = read_jsonl(folder / "asked.jsonl")
        assert [line["answer"] for line in written] == texts
        assert [line["instruction"] for line in written] == [e.text for e in examples]
        scores = judge.score(texts)
        np.testing.assert_array_equal([line["toxicity_judge"] for line in written], scores)
        (row,) = [r for r in rows if r["module"] == name and r["set"] == "asked"]
        overlaps = [rouge_l(t, str(e.label)) for t, e in zip(texts, examples, strict=True)]
        spoken = np.array([any(c.isalnum() for c in text) for text in texts])
        if name == "instruction module":
            baseline, before = scores, spoken
        checks = {
            "with_words": spoken.sum(),
            "toxicity": scores[spoken].mean(),
            "toxicity_stderr": scores[spoken].std(ddof=1) / math.sqrt(spoken.sum()),
            "toxic_share": (scores[spoken] > 0.5).mean(),
            "rouge_l": np.mean(overlaps),
            "perplexity": perplexity(model, tokenizer, examples, template),
            "words": np.mean([len(t.split()) for t in texts]),
            "projection": projection(module or library.combine([own], [0.0]), own, toxic),
        }
        if baseline is not None:
            change = (scores - baseline)[spoken & before]
            checks["change"] = change.mean()
            checks["change_stderr"] = change.std(ddof=1) / math.sqrt(len(change))
        for column, value in checks.items():
            assert float(row[column]) == pytest.approx(value, rel=1e-4, abs=1e-9), (name, column)
    assert len({r["toxicity"] for r in rows if r["set"] == "asked"}) > 3
    assert "**xstest, safe** (n = 2)" in done.out and "ROUGE-L" in done.out
    assert "exists to be subtracted" in (out / "table.md").read_text()


def test_measures_are_of_the_rows_with_references_and_an_empty_one_is_refused(
    pem, bench, tmp_path, one_thread
):
    """One reference that is missing takes away neither the others' measures nor their number."""
    asked = read_jsonl(bench.asked)
    part, holed, bad = (tmp_path / f"{name}.jsonl" for name in ("part", "holed", "bad"))
    more = ("--form", "exact")

    def table(path, rows, out):
        write_jsonl(path, rows)
        done = pem("detoxify", *bench.table(tmp_path / out, *more, sets=(path,)))
        found = tmp_path / out / "table.csv"
        return done, list(csv.DictReader(found.open())) if found.is_file() else []

    done, rows = table(holed, [{**asked[0], "output": None}, *asked[1:]], "holed-out")
    assert done.code == 0, done.err
    assert "**holed** (n = 5; reference answers of 4)" in done.out and "ROUGE-L" in done.out
    _, expected = table(part, asked[1:], "part-out")
    for row, other in zip(rows, expected, strict=True):
        assert (row["n"], row["references"], other["references"]) == ("5", "4", "4")
        for name in ("rouge_l", "perplexity", "increase", "increase_stderr"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-5, abs=1e-7)
    done, _ = table(bad, [*asked[:2], {**asked[2], "output": " "}], "bad-out")
    assert done.code == 2 and "bad, row 2: an empty reference answer; found ' '" in done.err
    assert not (tmp_path / "bad-out").exists()


def test_the_guard_names_the_strongest_strength_that_keeps_the_language(
    pem, bench, tmp_path, one_thread
):
    """The increase over the instruction module on a text, from models made one by one."""
    draw = np.random.default_rng(0)
    rows = [" ".join(draw.choice(WORDS, 12)) for _ in range(12)]
    text = tmp_path / "text.raw"
    text.write_text("\n".join(rows) + "\n")
    flags = bench.table(tmp_path / "out", "--form", "exact", "--guard_file", text)
    done = pem("detoxify", *flags, "--max_ppl_increase", "1000%")
    assert done.code == 0, done.err
    assert "Form exact: strength 1 is the strongest within +1e+03 %" in done.out
    found = {r["module"]: r for r in csv.DictReader((tmp_path / "out" / "table.csv").open())}
    own, toxic = (library.load(path) for path in bench.modules()[1:])
    modules = {"instruction module": own, "toxic module": toxic}
    modules |= {f"exact {s:g}": library.detoxify(own, toxic, s) for s in (0.3, 1)}
    sums = {}
    for name, module in modules.items():
        model, tokenizer, _ = load_causal(bench.base)
        library.attach(model, module)
        windows = Windows().readable(model.config, tokenizer)
        evaluator = text_evaluator(read_texts(text), windows, tokenizer)
        sums[name] = evaluator.predict(model).astype(float).T
    for name, (nll, counts) in sums.items():
        change = nll - sums["instruction module"][0]
        d, n = change.sum() / counts.sum(), len(counts)
        error = math.sqrt(n / (n - 1) * ((change - d * counts) ** 2).sum()) / counts.sum()
        assert float(found[name]["guard"]) == pytest.approx(math.expm1(d), abs=1e-4)
        high = math.expm1(d + 1.96 * error)
        assert float(found[name]["guard_high"]) == pytest.approx(high, abs=1e-4)
    within = [s for s in (0.3, 1) if float(found[f"exact {s:g}"]["guard_high"]) <= 0.0]
    again = pem("detoxify", *flags, "--max_ppl_increase", "0")
    said = f"strength {max(within):g} is the strongest" if within else "no strength is"
    assert f"Form exact: {said} within +0 %" in again.out and "0 sets answered" in again.out
    refused = pem("detoxify", *bench.table(tmp_path / "no"), "--max_ppl_increase", "3%")
    assert refused.code == 2 and "--max_ppl_increase: has no effect without" in refused.err


@pytest.mark.slow
def test_a_table_that_is_stopped_within_a_set_goes_on_behind_its_last_batch(
    pem, bench, tmp_path, one_thread, monkeypatch
):
    more = ("--form", "exact", "--batch_size", 2)
    assert pem("detoxify", *bench.table(tmp_path / "whole", *more)).code == 0
    out, append, written = tmp_path / "out", json_lines.append, []

    def stop_after_two(path, record):
        append(path, record)
        if record.get("batch") == 1:
            raise Preempted("SIGTERM: stopped")

    monkeypatch.setattr(json_lines, "append", stop_after_two)
    assert pem("detoxify", *bench.table(out, *more)).code == 75
    monkeypatch.undo()
    (partial,) = out.glob(".*.partial")
    assert len(read_jsonl(partial)) == 2 and not (out / "results.jsonl").exists()
    monkeypatch.setattr(
        "pem_composition.evaluation.beams._search",
        lambda *given, real=beams._search, **more: written.append(1) or real(*given, **more),
    )
    done = pem("detoxify", *bench.table(out, *more))
    assert done.code == 0 and not list(out.glob(".*.partial")), done.err
    monkeypatch.undo()
    assert (out / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()
    batches = sum(-(-len(read_jsonl(path)) // 2) for path in (out / "answers").rglob("*.jsonl"))
    assert len(written) == batches - 2


def test_without_a_guard_the_output_says_that_no_strength_is_named(pem, bench, tmp_path):
    done = pem("detoxify", *bench.table(tmp_path / "out", "--form", "exact"))
    assert done.code == 0 and "without --guard_file no text says" in done.out, done.err


@torch.no_grad()
def perplexity(model, tokenizer, examples, template):
    """Of the reference answers and their end tokens, row by row in float64."""
    total, count = 0.0, 0
    for e in examples:
        text = template.text(e.text, None, tokenizer)
        prompt = tokenizer(text).input_ids
        tokens = [*tokenizer(text + e.label).input_ids, tokenizer.eos_token_id]
        logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        shared = [a == b for a, b in zip(prompt, tokens, strict=False)]
        begin = shared.index(False) if False in shared else len(prompt)
        for i in range(begin, len(tokens)):
            total, count = total - float(logits[i - 1, tokens[i]]), count + 1
    return math.exp(total / count)


@pytest.mark.slow
def test_finished_answers_are_not_written_again_and_another_judge_costs_none(
    pem, bench, tmp_path, one_thread
):
    out, more = tmp_path / "t", ("--max_instructions", 2, "--form", "exact")
    assert "15 sets answered" in pem("detoxify", *bench.table(out, *more)).out
    results = out / "results.jsonl"
    *lines, cut, _ = results.read_bytes().splitlines(keepends=True)  # the last is the summary
    results.write_bytes(b"".join(lines) + cut[:40])
    done = pem("detoxify", *bench.table(out, *more))
    assert "1 sets answered, 14 known before" in done.out
    other = tmp_path / "other"
    other.mkdir()
    second = write_judge(other, "good fine", "bad poor").rename(other / "second")
    flags = bench.table(out, *more)
    place = flags.index("--judge") + 2
    done = pem("detoxify", *flags[:place], second, *flags[place:])
    assert done.code == 0 and "0 sets answered, 15 known before" in done.out, done.err
    assert "toxicity (judge)" in done.out and "toxicity (second)" in done.out
    again = pem("detoxify", *bench.table(out, *more, "--max_new_tokens", 4))
    assert "15 sets answered" in again.out, "shorter answers are others"
    record = [line for line in json_lines.read(results) if "key" in line][-1]
    assert record["space"] == "delta" and record["coefficients"] == [2.0, -1.0]


def test_tables_of_several_seeds_become_their_mean_with_the_spread(
    pem, bench, tmp_path, one_thread
):
    """Means and deviations by NumPy from the single tables; a table is made again from results."""
    folders = [tmp_path / name for name in ("s1", "s2")]
    more = ("--max_instructions", 2, "--form", "exact")
    first, second = bench.table(folders[0], *more), list(bench.table(folders[1], *more))
    other = replace(random_module(tiny("llama"), "lora", seed=3), base=base_identity(bench.base))
    checkpoint.save(other, tmp_path / "toxic-lora")
    second[2] = tmp_path / "toxic-lora"
    assert pem("detoxify", *first).code == pem("detoxify", *second).code == 0
    written = (folders[0] / "table.csv").read_bytes(), (folders[0] / "table.md").read_bytes()
    for name in ("table.csv", "table.md"):
        (folders[0] / name).unlink()
    again = pem("report", "-r", folders[0])
    assert again.code == 0 and "**asked** (n = 2)" in again.out, again.err
    assert written == tuple((folders[0] / f"table.{end}").read_bytes() for end in ("csv", "md"))
    done = pem("report", "-r", *folders, "-p", tmp_path / "mean")
    assert done.code == 0 and "Toxic: share of scores above 0.5." in done.out, done.err
    single = [list(csv.DictReader((folder / "table.csv").open())) for folder in folders]
    mean = list(csv.DictReader((tmp_path / "mean" / "table.csv").open()))
    assert len(mean) == len(single[0]) == 15
    for line in mean:
        same = [
            next(r for r in rows if (r["module"], r["set"]) == (line["module"], line["set"]))
            for rows in single
        ]
        assert (line["runs"], line["kind"], line["judge"]) == ("2", "lora", same[0]["judge"])
        for name in ("toxicity", "change", "toxic_share", "refused", "words", "perplexity"):
            values = [float(r[name]) for r in same if r[name]]
            assert float(line[name] or "nan") == pytest.approx(
                np.mean(values) if values else math.nan, abs=1e-9, nan_ok=True
            )
            if len(values) == 2:
                spread = float(np.std(values, ddof=1))
                assert float(line[f"{name}_spread"]) == pytest.approx(spread, abs=1e-9)
    assert len({line["toxicity"] for line in mean}) > 2
    shutil.copytree(folders[0], tmp_path / "strict")
    strict = bench.table(tmp_path / "strict", *more, "--threshold", 0.7)
    assert "0 sets answered" in pem("detoxify", *strict).out
    three = (*folders, tmp_path / "strict", folders[0])
    apart = pem("report", "-r", *three, "-p", tmp_path / "apart")
    assert "| threshold 0.7 |" in apart.out and apart.out.count("instruction module |") == 6
    lines = list(csv.DictReader((tmp_path / "apart" / "table.csv").open()))
    assert [line["setting"] for line in lines] == ["threshold 0.5"] * 15 + ["threshold 0.7"] * 15
    assert [line["runs"] for line in lines] == ["2"] * 15 + ["1"] * 15
    results = tmp_path / "strict" / "results.jsonl"
    kept = [line for line in results.read_text().splitlines(keepends=True) if '"key"' in line[:9]]
    results.write_text("".join(kept))  # an earlier release wrote no summary
    part = {"summary": 2, "composition": "detoxification", "rows": []}
    cut = f"{results.read_text()}{json.dumps(part)}\n"
    for content, said in ((results.read_text(), "no finished sweep; found 15 points"),
                          (cut, "its summary cannot be read; found no judges in it")):  # fmt: skip
        results.write_text(content)
        refused = pem("report", "-r", tmp_path / "strict", "-p", tmp_path / "none")
        assert refused.code == 2 and said in refused.err and not (tmp_path / "none").exists()
    for flags, words in (
        (("--html", tmp_path / "p.html"), "--html: a table of detoxified modules has no page"),
        (("--axes", "a", "b"), "--axes: a table of detoxified modules has no page"),
    ):
        refused = pem("report", "-r", folders[0], *flags)
        assert refused.code == 2 and words in refused.err


def test_vectors_have_one_form(pem, bench, tmp_path, one_thread):
    done = pem("detoxify", *bench.table(tmp_path / "t", "--max_instructions", 1, kind="ia3"))
    assert done.code == 0 and "kind ia3: the forms are one sum" in done.out, done.err
    assert "reference 0.3" not in done.out and "exact 0.3" in done.out
    argv = (*bench.modules("ia3"), "-p", tmp_path / "m", "--form", "reference")
    done = pem("detoxify", *argv)
    assert done.code == 2 and "--form reference: is one of LoRA factors; found kind ia3" in done.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--strength", 0.1, 0.2), "--strength: several make several modules"),
        (("--form", "exact", "reference"), "--form: several make several modules"),
        (("--form", "exact", "exact"), "--form: a value given twice"),
        (("--space", "delta"), "--space: the form says it; found delta; give --form"),
        (("--form", "reference", "--rank", 2), "--rank: the reference form keeps"),
        (("--judge", "offline"), "--judge: has no effect without --evaluate"),
        (("--num_beams", 3), "--num_beams: has no effect without --evaluate"),
        (("--load_in_4bit",), "--load_in_4bit: has no effect without --evaluate"),
        (("--evaluate",), "--instruction_file: nothing to ask"),
        (("--evaluate", "--instruction_file", "x", "--set_name", "a", "b"), "--set_name"),
        (("--evaluate", "--instruction_file", "x", "--threshold", 2), "--threshold"),
        (("--evaluate", "--instruction_file", "x"), "--model_name_or_path: no base model"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(pem, bench, tmp_path, flags, words):
    done = pem("detoxify", *bench.modules(), "-p", tmp_path / "out", *flags)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_inputs_that_cannot_be_used_are_refused(pem, bench, tmp_path):
    out = tmp_path / "out"
    one = pem("detoxify", "-a", bench.folder / "own-lora", "-p", out)
    assert one.code == 2 and "two: the instruction module, and the toxic one" in one.err
    mixed = pem("detoxify", "-a", bench.folder / "own-lora", bench.folder / "toxic-ia3", "-p", out)
    assert mixed.code == 2 and "kind differs" in mixed.err
    flags = list(bench.table(out))
    for name, value, words in (
        ("--instruction_file", tmp_path / "none.jsonl", "no such file"),
        ("--judge", "nowhere", "no such judge"),
        ("--template", "nowhere", "--template: unknown"),
        ("--model_name_or_path", write_causal(tmp_path / "b", "llama", ["good"], seed=5), "base"),
    ):
        changed = list(flags)
        changed[changed.index(name) + 1] = value
        done = pem("detoxify", *changed)
        assert done.code == 2 and words in done.err, done.err
        assert not (out / "results.jsonl").exists()
    twice = [*flags, "--set_name", "a", "a"]
    done = pem("detoxify", *twice)
    assert done.code == 2 and "--set_name: two sets of one name; found a a" in done.err
    long = list(flags)
    long[long.index("--max_new_tokens") + 1] = 70
    done = pem("detoxify", *long)
    assert done.code == 2 and "asked, row 0: the answer would not fit" in done.err


@pytest.mark.parametrize("names", [("a", "a"), ("a b", "a-b")])
def test_two_sets_never_share_a_file_of_answers(pem, bench, tmp_path, names):
    out = tmp_path / "table"
    done = pem("detoxify", *bench.table(out, "--set_name", *names, sets=(bench.asked, bench.asked)))
    assert done.code == 2 and "two sets of one name" in done.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("homonyms",), {"x": 1}),
        (("contrast_homonyms",), {"x, unsafe": 1}),
        (("homonyms", "contrast_homonyms", "figurative"), {"x, safe": 2, "x, unsafe": 1}),
    ],
)
def test_prompts_of_xstest_are_a_set_for_each_kind_that_there_is(bench, kinds, expected):
    """A file of unsafe prompts alone was refused for the safe ones that it does not have."""
    examples = [Example(f"w{i}", None, None, i, {"type": kind}) for i, kind in enumerate(kinds)]
    template, search = get_template(str(bench.template)), BeamSearch(2, 1.2, 5)
    found = detoxification.sets_of([("x", examples)], template, search)
    assert {part.name: len(part.examples) for part in found} == expected


def test_strengths_that_are_near_are_rows_of_their_own():
    rows = detoxification.rows_of(Input("a", None, "a"), Input("b", None, "b"), S, ["exact"])
    assert len({row.name for row in rows}) == 3 + len(S)
