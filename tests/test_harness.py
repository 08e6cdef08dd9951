"""Tasks of the lm-evaluation-harness on compositions: its numbers, nothing stale, no code run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import unlearning_data as data
from support.jsonl import write_jsonl
from support.tiny_models import VOCABULARY, write_causal
from transformers import AutoModelForCausalLM, AutoTokenizer

import pem_composition as library
from pem_composition import cli, json_lines

without = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval ([harness])")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WORDS = (*data.GOOD, *data.BAD)
TASKS = ("choice", "text", "writing")
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "label",
    "doc_to_choice": ["good", "bad", "fine"], "fewshot_split": "validation",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
TEXT = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}  # fmt: skip
WRITING = {
    "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{word}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
    "filter_list": [{"name": "first", "filter": [
        {"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"},
    ]}],
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Paths of a base, two modules, their average, and a folder of task files."""

    base: Path
    modules: tuple[Path, Path]
    merged: Path
    tasks: Path

    def flags(self, *names: str) -> list[str]:
        """Which model is asked what."""
        given = ["--model_name_or_path", self.base, "--harness_include", self.tasks]
        return [*map(str, given), "--harness_tasks", *(names or TASKS)]


def write_task(folder: Path, name: str, **settings: object) -> Path:
    """A task file with rows of its own beside it."""
    draw = np.random.default_rng(7)
    texts = [" ".join(draw.choice(WORDS, size=4)) for _ in range(8)]
    rows = [{"text": t, "label": i % 3, "word": t.split()[0]} for i, t in enumerate(texts)]
    file = write_jsonl(folder / f"{name}.jsonl", rows)
    task = {
        "task": name, "dataset_path": "json", "test_split": "validation",
        "dataset_kwargs": {"data_files": {"validation": str(file)}}, "metadata": {"version": 1.0},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings))
    return folder


def make_tasks(folder: Path) -> Path:
    folder.mkdir()
    for name, settings in zip(TASKS, (CHOICE, TEXT, WRITING), strict=True):
        write_task(folder, name, **settings)
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("harness")
    base = write_causal(folder / "base", "llama", [" ".join(WORDS)] * 9)
    tokenizer = AutoTokenizer.from_pretrained(base)
    # With PEFT the harness cuts embeddings to the tokens that there are.
    tokenizer.add_tokens([f"<{n}>" for n in range(VOCABULARY - len(tokenizer))])
    tokenizer.save_pretrained(base)
    a, b = (
        data.write_module(folder / n, "llama", "lora", base, s) for n, s in (("a", 1), ("b", 2))
    )
    for path in (a, b):  # alpha / r = 2: then PEFT and the fused product round alike
        module = library.load(path)
        replace(module, config=replace(module.config, alpha=2.0 * module.config.r)).save(
            path, overwrite=True
        )
    (0.5 * library.load(a) + 0.5 * library.load(b)).save(folder / "merged")
    return Bench(base, (a, b), folder / "merged", make_tasks(folder / "tasks"))


def results(out: Path) -> list[dict]:
    return [r for r in json_lines.read(out / "results.jsonl") if "key" in r]


def sweep(bench: Bench, out: Path, *words: str) -> list[dict]:
    """pem sweep over three points; the lines of its results."""
    flags = ["-a", *map(str, bench.modules), "-p", str(out), "--grid", "0", "0.5", "1"]
    flags += ["--space", "parameter", "--use_cpu"]
    assert cli.main(["sweep", *flags, *(words or bench.flags())]) == 0
    return results(out)


def asked_by_the_harness(bench: Bench, peft: Path | None, limit: int | None = None) -> dict:
    """The oracle: the harness loads the base, and PEFT the module that was written."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    given = {"pretrained": str(bench.base), "dtype": "float32", "device": "cpu"}
    found = lm_eval.simple_evaluate(
        model="hf", model_args=given | ({"peft": str(peft)} if peft else {}), tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(bench.tasks), include_defaults=False),
        limit=limit,
    )  # fmt: skip
    return {
        name: {k.replace(",none", ""): v for k, v in scores.items() if isinstance(v, float)}
        for name, scores in found["results"].items()
    }


@without
def test_a_grid_scores_what_the_harness_scores_on_each_written_composition(
    bench: Bench, tmp_path: Path
) -> None:
    found = sweep(bench, tmp_path / "out")
    points = {"b": bench.modules[1], "a": bench.modules[0], "a b": bench.merged}
    for names, path in points.items():
        oracle = asked_by_the_harness(bench, path)
        for line in (line for line in found if " ".join(line["names"]) == names):
            for metric, score in line["scores"].items():
                assert oracle[line["task"]].pop(metric) == score
        assert all(
            name.partition(",")[0].endswith("_stderr") for t in oracle.values() for name in t
        )
    assert len({line["score"] for line in found if line["task"] == "text"}) == len(points)


@without
def test_a_module_alone_and_none_at_all(bench: Bench, tmp_path: Path) -> None:
    for name, module in (("base", None), ("merged", bench.merged)):
        out, words = tmp_path / name, ["--adapter", str(module)] if module else []
        flags = [*bench.flags(), "--limit", "5", "--use_cpu", "--output_dir", str(out)]
        assert cli.main(["evaluate", *flags, *words]) == 0
        found = json.loads((out / "eval_results.json").read_text())
        for task, scores in asked_by_the_harness(bench, module, limit=5).items():
            for metric, score in scores.items():
                kept = metric.replace("_stderr", "")
                key = f"{kept}_stderr" if "_stderr" in metric else kept
                assert found[f"eval_{task}_{key}"] == score, metric
            samples = json_lines.read(out / f"samples_{task}.jsonl")
            assert len(samples) == 5 == found[f"eval_{task}_harness"]["harness"]["limit"]


@without
def test_the_base_has_its_own_numbers_again_once_a_module_is_taken_off(bench: Bench) -> None:
    from pem_composition.adapters import attach
    from pem_composition.evaluation import harness
    from pem_composition.evaluation.models import load_text_to_text

    tasks = harness.read(TASKS, include=str(bench.tasks))
    model, tokenizer, _ = load_text_to_text(bench.base)
    lm = harness.language_model(model, tokenizer)
    before = [task.answer(lm) for task in tasks]
    attached = attach(model, library.load(bench.merged))
    within = [task.answer(lm) for task in tasks]
    attached.detach()
    assert [task.answer(lm) for task in tasks] == before != within


@without
def test_strengths_of_a_negation_on_tasks_to_forget_and_to_keep(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, written = tmp_path / "out", tmp_path / "written"
    module = ["-a", str(bench.modules[0])]
    words = [*bench.flags("text", "choice"), "--grid", "0", "0.5", "1", "--evaluate", "--use_cpu"]
    assert cli.main(["negation", *module, "-p", str(out), *words]) == 0
    assert "text against the base model" in capsys.readouterr().out
    assert cli.main(["negation", *module, "-p", str(written), "--strength", "0.5"]) == 0
    summary, by_key = (
        json_lines.read(out / "results.jsonl")[-1],
        {r["key"]: r for r in results(out)},
    )
    compositions = {"base": None, "module": bench.modules[0], "strength 0.5": written}
    for row in summary["rows"]:
        records = [by_key[key] for key in row["keys"]]
        if row["id"] in compositions:
            oracle = asked_by_the_harness(bench, compositions[row["id"]])
            for record in records:
                assert record["scores"].items() <= oracle[record["task"]].items()
        base = [by_key[key] for key in summary["rows"][0]["keys"]]
        for gain, record, before in zip(row["gains"], records, base, strict=True):
            assert gain["gain"] == pytest.approx(record["score"] - before["score"], abs=1e-9)
    assert [row["id"] for row in summary["rows"]][2:] == ["strength 0.5", "strength 1"]


@without
def test_gains_are_paired_row_by_row(bench: Bench, tmp_path: Path) -> None:
    found = [r for r in sweep(bench, tmp_path / "out") if r["task"] == "choice"]
    rows = json_lines.read(tmp_path / "out" / "results.jsonl")[-1]["rows"]
    by_key = {r["key"]: r for r in found}
    accs = {
        key: np.array([s["acc"] for s in json_lines.read(tmp_path / "out" / record["samples"])])
        for key, record in by_key.items()
    }
    a, b = (accs[row["keys"][0]] for row in rows[:2])
    for row in rows:
        paired = accs[row["keys"][0]] - (a + b) / 2
        gain = row["gains"][0]
        assert gain["gain"] == pytest.approx(paired.mean(), abs=1e-12)
        assert gain["gain_standard_error"] == pytest.approx(paired.std(ddof=1) / len(paired) ** 0.5)


@without
def test_a_perplexity_has_an_error_of_rows_drawn_again(bench: Bench, tmp_path: Path) -> None:
    for record in (r for r in sweep(bench, tmp_path / "out") if r["task"] == "text"):
        logs, words = np.array(record["values"]).T
        draw = np.random.default_rng(0).integers(len(logs), size=(20_000, len(logs)))
        again = np.exp(-logs[draw].sum(1) / words[draw].sum(1))
        assert record["score"] == pytest.approx(np.exp(-logs.sum() / words.sum()))
        assert record["standard_error"] == pytest.approx(again.std(), rel=0.1)
        assert record["standard_error_by"] == "rows drawn again"


@without
def test_nothing_is_scored_twice_and_nothing_stale_is_served(bench: Bench, tmp_path: Path) -> None:
    tasks, out = make_tasks(tmp_path / "tasks"), tmp_path / "out"
    own = Bench(bench.base, bench.modules, bench.merged, tasks)
    words = own.flags("choice")
    count = len(sweep(own, out, *words))
    assert len(sweep(own, out, *words)) == count
    moved = tasks.rename(tmp_path / "elsewhere")  # where files lie decides nothing
    file = moved / "choice.yaml"
    file.write_text(file.read_text().replace(str(tasks), str(moved)))
    words = Bench(bench.base, bench.modules, bench.merged, moved).flags("choice")
    assert len(sweep(own, out, *words)) == count
    rows = json_lines.read(moved / "choice.jsonl")
    other = [{**rows[0], "label": 2}, *rows[1:]]
    changes = {
        "a row": lambda: write_jsonl(moved / "choice.jsonl", other),
        "a template": lambda: file.write_text(file.read_text().replace("{{text}}", "so {{text}}")),
        "a version": lambda: file.write_text(file.read_text().replace("1.0", "2.0")),
    }  # fmt: skip
    for times, (what, change) in enumerate(changes.items(), start=2):
        change()
        assert len(sweep(own, out, *words)) == times * count, what
    assert len(sweep(own, out, *words, "--num_fewshot", "1")) == (times + 1) * count
    assert len(sweep(own, out, *words, "--limit", "3")) == (times + 2) * count


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Whoever looks for a host is noted and refused, as if the environment said nothing."""
    import datasets
    import huggingface_hub

    asked: list[object] = []

    def refuse(*words: object, **_: object) -> None:
        asked.append(words[:2])
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield asked


@without
def test_local_tasks_reach_for_no_network(bench: Bench, no_network: list[object]) -> None:
    from pem_composition.evaluation import harness
    from pem_composition.evaluation.models import load_text_to_text

    model, tokenizer, _ = load_text_to_text(bench.base)
    no_network.clear()
    lm = harness.language_model(model, tokenizer)
    for task in harness.read(TASKS, include=str(bench.tasks)):
        task.answer(lm)
    assert no_network == []


BAD = {
    "code": ({**CHOICE, "doc_to_text": "CODE"}, "!function utils.text"),
    "class": ({**CHOICE, "class": "utils.Task"}, "class: utils.Task"),
    "metric": ({**CHOICE, "metric_list": [{"metric": "somebody/metric"}]}, "somebody/metric"),
    "included": ({**CHOICE, "include": "other.inc"}, "!function utils.text"),
    "template": ({**CHOICE, "doc_to_text": "{{ text.__class__.__mro__ }}"}, "SecurityError"),
    "direction": (
        {**CHOICE, "metric_list": [{"metric": "acc", "higher_is_better": False}]},
        "higher_is_better of acc",
    ),
    "column": ({**CHOICE, "doc_to_text": "{{nothing}}"}, "'nothing' is undefined"),
    "name": ({**CHOICE, "task": "../../up", "tag": "bad"}, "a file of the task's name"),
    "empty": (CHOICE, "an empty data file"),
}  # fmt: skip


@without
@pytest.mark.parametrize("name", BAD)
def test_a_task_that_cannot_be_used_is_one_line(
    bench: Bench, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, reason = BAD[name]
    write_task(tmp_path, "bad", **settings)
    ran = tmp_path / "ran"
    (tmp_path / "utils.py").write_text(f"open({str(ran)!r}, 'w')\ntext = Task = str\n")
    (tmp_path / "other.inc").write_text("doc_to_target: !function utils.text\n")
    if name == "empty":
        (tmp_path / "bad.jsonl").write_text("")
    file = tmp_path / "bad.yaml"
    file.write_text(file.read_text().replace("CODE", "!function utils.text"))
    flags = ["--harness_include", str(tmp_path), "--harness_tasks", "bad", "--use_cpu"]
    assert cli.main(["evaluate", "--model_name_or_path", str(bench.base), *flags]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1
    assert not ran.exists()


@without
def test_scores_of_both_directions_have_a_gain_each_and_no_mean(
    bench: Bench, tmp_path: Path
) -> None:
    sweep(bench, tmp_path, *bench.flags("text", "choice"))
    summary = json_lines.read(tmp_path / "results.jsonl")[-1]
    assert summary["signs"] == [-1, 1]
    assert {v for row in summary["rows"] for v in row["mean"].values()} == {None}
    assert set(summary["average"]["mean"].values()) == {None}
    header = (tmp_path / "table.md").read_text().splitlines()[2]
    assert "| text against the average |" in header and "| choice against the average |" in header
    assert "mean" not in header


@without
def test_rows_are_read_anew_whatever_the_date_of_their_file(bench: Bench, tmp_path: Path) -> None:
    write_task(tmp_path, "choice", **CHOICE)
    own, file = replace(bench, tasks=tmp_path), tmp_path / "choice.jsonl"
    before = {r["key"] for r in sweep(own, tmp_path / "out", *own.flags("choice"))}
    date = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace('"label": 0', '"label": 1', 1))
    os.utime(file, ns=(date, date))
    after = {r["key"] for r in sweep(own, tmp_path / "out", *own.flags("choice"))}
    assert len(after) == 2 * len(before) == 6


@without
@pytest.mark.parametrize("name", ["mean", "worst", "invalid"])
def test_no_task_is_called_as_what_is_said_of_all_tasks(
    bench: Bench, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in (name, "other"):
        write_task(tmp_path, task, **CHOICE)
    flags = replace(bench, tasks=tmp_path).flags(name, "other")
    modules = list(map(str, bench.modules))
    assert cli.main(["sweep", "-a", *modules, *flags, "-p", str(tmp_path / "out")]) == 2
    assert f"found {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@without
@pytest.mark.parametrize("asked", [("--goal", "loss"), ("--constraint", "loss<=3")])
def test_scores_without_a_loss_are_not_searched_by_it(
    bench: Bench, asked: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", "-a", *map(str, bench.modules), *bench.flags("choice"), *asked]
    assert cli.main([*words, "-p", str(tmp_path / "out")]) == 2
    assert f"{asked[0]}: tasks of the harness have scores, no loss" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@without
def test_a_name_that_is_unknown_lists_those_that_are_near(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", *bench.flags("hellaswagg")]) == 2
    assert "near names: hellaswag" in capsys.readouterr().err


@without
def test_every_metric_improves_in_the_direction_that_the_harness_says() -> None:
    from lm_eval.api.registry import HIGHER_IS_BETTER_REGISTRY as REGISTRY

    from pem_composition.evaluation import harness  # which fills the registry
    from pem_composition.evaluation.metrics import greater_is_better

    known = {name: bool(REGISTRY.get(name)) for name in REGISTRY}
    assert harness and len(known) > 10
    assert known == {name: greater_is_better(name) for name in known}


FLAGS = {
    "--limit: has no effect without --harness_tasks": ("--task_name", "sst2", "--limit", "5"),
    "--task_name: says nothing": ("--harness_tasks", "x", "--task_name", "sst2"),
    "--limit: cannot be used": ("--harness_tasks", "x", "--limit", "1"),
}


@pytest.mark.parametrize("reason", FLAGS)
def test_flags_that_contradict_each_other(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--model_name_or_path", "minilm", *FLAGS[reason]]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_the_missing_package_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model_name_or_path", "minilm", "--harness_tasks", "x"]
    assert cli.main(words) == 3
    assert "pip install pem_composition[harness]" in capsys.readouterr().err


NEXT_WORD = Path(__file__).parents[1] / "exps" / "composition_for_unlearning" / "next_word.py"


def make_next_word(file: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """The program that makes the task, from four words of each text."""
    given = ["--text_file", str(file), "--output_dir", str(folder), "--words", "4", *flags]
    return subprocess.run(
        [sys.executable, NEXT_WORD, *given], capture_output=True, text=True, check=False
    )


def test_the_next_word_is_that_which_follows_and_never_one_beside_punctuation(
    tmp_path: Path,
) -> None:
    texts = ["a b c d e f", "too short a text", "a b c d e, f", "x  y\nz w end"]
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    assert make_next_word(file, tmp_path / "task", "--rows", "2").returncode == 0
    assert json_lines.read(tmp_path / "task" / "next_word.jsonl") == [
        {"context": "a b c d", "word": "e"}, {"context": "x y z w", "word": "end"},
    ]  # fmt: skip
    done = make_next_word(file, tmp_path / "none", "--rows", "3")
    assert done.returncode == 2 and not (tmp_path / "none").exists()
    assert f"{file}: 2 texts go on after 4 words with a bare word; expected 3" in done.stderr


@without
def test_the_next_word_task_is_the_log_likelihood_of_that_word(
    bench: Bench, tmp_path: Path
) -> None:
    """The oracle: the model of transformers, a word at a time."""
    draw = np.random.default_rng(3)
    texts = [" ".join(draw.choice(WORDS, size=6)) for _ in range(12)]
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    assert make_next_word(file, tmp_path / "task", "--rows", "12").returncode == 0
    flags = ["--harness_tasks", "next_word", "--harness_include", str(tmp_path / "task")]
    flags += ["--model_name_or_path", str(bench.base), "--use_cpu", "--output_dir"]
    assert cli.main(["evaluate", *flags, str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())

    tokenizer = AutoTokenizer.from_pretrained(bench.base)
    model = AutoModelForCausalLM.from_pretrained(bench.base).eval()
    likelihoods, greedy = [], []
    for text in texts:
        words = text.split()
        context = tokenizer(" ".join(words[:4]))["input_ids"]
        whole = tokenizer(" ".join(words[:5]))["input_ids"]
        assert whole[: len(context)] == context
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        steps = [(i, whole[i + 1]) for i in range(len(context) - 1, len(whole) - 1)]
        likelihoods.append(sum(float(scores[i, token]) for i, token in steps))
        greedy.append(all(int(scores[i].argmax()) == token for i, token in steps))
    assert found["eval_next_word_acc"] == np.mean(greedy)
    expected = np.exp(-np.mean(likelihoods))
    assert found["eval_next_word_perplexity"] == pytest.approx(expected, rel=1e-4)
