"""Control rows of sweeps and searches: each by hand, paired, resumed, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize
from support import own_heads, sweep_by_hand, sweep_data
from support.sweep_by_hand import ANSWERS, LABELS, Hand, asked, check_by_hand, refused, run
from support.tiny_models import random_module, tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pem_composition as library
from pem_composition import json_lines
from pem_composition.arithmetic.random_update import random_update
from pem_composition.config import FullConfig, HeadInfo, LoraConfig
from pem_composition.evaluation.evaluator import matching_prior
from pem_composition.report import table
from pem_composition.report.records import Results, read
from pem_composition.sweep.controls import Controls, random_input
from pem_composition.sweep.points import Input, Point, Settings, read_input

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
GRID = ("--grid", "0", "0.25", "1")


def update(module: library.PEM, tensors, layer: str) -> np.ndarray:
    """What a module adds to a layer (for (IA)^3 to the vector of ones), float64."""
    own = {n.rpartition(".")[2]: t.double().numpy() for n, t in tensors.items()
           if n.rpartition(".")[0] == layer}  # fmt: skip
    if module.kind == "lora":
        return module.config.scaling(layer) * own["lora_B"] @ own["lora_A"]
    return own["ia3"] - 1 if module.kind == "ia3" else own["delta"]


@pytest.mark.parametrize("kind", ["lora", "ia3", "full"])
def test_a_random_update_has_the_norms_of_the_modules_layer_by_layer(kind):
    if kind == "full":
        own = {f"{n}.delta": torch.randn(s) for n, s in (("a", (3, 4)), ("b", (5,)))}
        module = library.PEM(own, FullConfig())
    else:
        rank = {"rank_pattern": {"query": 2}} if kind == "lora" else {}
        module = random_module(tiny("roberta"), kind, seed=1, **rank)
    drawn = random_update(module, 7)
    assert {n: t.shape for n, t in drawn.items()} == {
        n: t.shape for n, t in module.adapter_tensors().items()
    }
    for layer in module.layers:
        mine, its = (update(module, t, layer) for t in (module.tensors, drawn))
        assert np.linalg.norm(its) == pytest.approx(np.linalg.norm(mine), rel=1e-6)
        assert abs((mine * its).sum()) < 0.9 * np.linalg.norm(mine) ** 2
    again, other = random_update(module, 7), random_update(module, 8)
    assert all(torch.equal(drawn[n], again[n]) for n in drawn)
    assert not any(torch.equal(drawn[n], other[n]) for n in drawn)


def test_a_random_update_of_a_layer_that_does_nothing_is_nothing():
    module = random_module(tiny("roberta"), seed=1)
    layer = module.layers[0]
    for role in ("lora_A", "lora_B"):
        tensors = {**module.tensors, f"{layer}.{role}": module.tensors[f"{layer}.{role}"] * 0}
        drawn = random_update(replace(module, tensors=tensors), 7)
        assert not update(module, drawn, layer).any()
        for other in module.layers[1:]:
            mine, its = (update(module, t, other) for t in (tensors, drawn))
            assert np.linalg.norm(its) == pytest.approx(np.linalg.norm(mine), rel=1e-6)


@pytest.mark.parametrize(
    ("head", "rows", "counts"),
    [
        (HeadInfo(("no", "yes"), "classification"), 2, True),
        (HeadInfo(("yes", "no"), "classification"), 2, False),
        (HeadInfo((), "classification"), 2, True),  # as PEFT saves it: by number
        (HeadInfo((), "classification"), 3, False),
        (HeadInfo((), "regression"), 1, False),
    ],
)
def test_the_average_of_the_outputs_is_over_heads_of_the_tasks_outputs(head, rows, counts):
    own = random_module(tiny("roberta"), seed=1).adapter_tensors()
    output = {"classifier.out_proj.weight.head": torch.ones(rows, 32)}
    module = library.PEM({**own, **output}, LoraConfig(4, 6, ("query", "value")), head=head)
    merge = Point((Input("m", module, "0"),) * 2, (0.5, 0.5), "delta")
    task = Controls(("task",), labels=(("no", "yes"),))
    found = {line.id: line.target for line in task.of(merge, Settings("base", head="first"))}
    assert ("control ensemble" in found) == counts
    if counts:
        (point,) = found["control ensemble"]
        assert (point.inputs, point.coefficients) == (merge.inputs, (0.5, 0.5))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> own_heads.Bench:
    return own_heads.make(tmp_path_factory.mktemp("bench"), tasks=("rte", "stsb"))


@pytest.fixture(scope="module")
def joint(bench: own_heads.Bench) -> Path:
    """A module with a head for every task, under their names."""
    modules = [library.load(path) for path in bench.modules]
    folder = bench.base.parent / "joint"
    library.combine(modules, [0.3, 0.3], space="delta", head="per-task").save(folder)
    return folder


@pytest.fixture(scope="module")
def train(bench: own_heads.Bench) -> list[Path]:
    """Training rows of every task."""
    folder = bench.base.parent
    return [own_heads.write_rows(folder / f"{t}.jsonl", t, 60, seed=9) for t in bench.tasks]


@pytest.fixture(scope="module")
def words(bench: own_heads.Bench, joint: Path, train: list[Path]) -> list[object]:
    """A search of two sums with controls and new last layers."""
    return [
        "search", *bench.flags(), "--head", "per-task", "--sampler", "grid",
        "--coefficients", "shared", "--grid", "0.4", "0.2", "0.6",
        "--controls", "--joint_module", joint, "--refit", "50", "--train_file", *train,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(*words, "-p", out) == 0
    return out


def rows_of(found: Results) -> dict[str, dict]:
    return {row["id"]: row for row in found.summary["rows"]}


def controlled(found: Results) -> dict:
    return rows_of(found)[found.summary["controlled"]]


def test_every_control_is_what_it_says(bench, finished, joint):
    found = read(finished)
    modules = [library.load(path) for path in bench.modules]
    c = controlled(found)["coefficients"]
    assert found.summary["controlled"] == "best sum in delta space"

    def summed(members, weights, **options):
        return library.combine(members, weights, space="delta", head="none", **options)

    def others(place):
        kept = [i for i in range(2) if i != place]
        return summed([modules[i] for i in kept], [c[i] for i in kept])

    inputs = [read_input(m.name, m, str(p)) for m, p in zip(modules, bench.modules, strict=True)]
    by_hand = {
        "own modules": lambda i: summed([modules[i]], [1.0]),
        "base": lambda i: summed([modules[0]], [0.0]),
        "random 2": lambda _: summed([random_input(i, 2).pem for i in inputs], c),
        "shrunk": lambda i: summed([modules[i]], [c[i]]),
        "left out": others,
        "rank": lambda _: summed(modules, c, rank=4),
        "joint 0": lambda _: library.load(joint),
        "rule sqrt": lambda _: summed(modules, [2**-0.5] * 2),
        "ensemble": lambda i: summed([modules[i]], [1.0]),  # no other head has the task's classes
    }
    hand, rows = own_heads.Hand(bench), rows_of(found)
    for name, made in by_hand.items():
        row = rows[f"control {name}"]
        assert row["control"] in name
        for place, (task, key) in enumerate(zip(bench.tasks, row["keys"], strict=True)):
            outputs = hand.outputs(task, "test", made(place))
            expected = outputs[:, 0] if task == "stsb" else outputs.argmax(1)
            given = [float(p) for p in found.points[key]["predictions"]]
            assert given == pytest.approx(expected.tolist(), abs=2e-5), (name, task)
    drawn = {row["id"] for row in rows.values() if row.get("control") == "random"}
    assert drawn == {f"control random {n}" for n in (1, 2, 3)}


def test_differences_to_the_merge_are_paired_over_the_rows(bench, finished):
    found = read(finished)
    merge = controlled(found)
    for row in found.summary["rows"]:
        for place, task in enumerate(bench.tasks[:1]):  # accuracy: a mean over rows
            gold = [r["label"] for r in json_lines.read(bench.rows[task, "test"])]
            classes = [own_heads.LABELS[task].index(g) for g in gold]
            right = [
                np.array([int(p) == g for p, g in zip(found.points[r["keys"][place]]["predictions"],
                                                      classes, strict=True)], float)
                for r in (row, merge)
            ]  # fmt: skip
            gap = right[0] - right[1]
            gains = row["gains"][place]
            assert gains["difference"] == pytest.approx(gap.mean())
            expected = gap.std() / np.sqrt(len(gap))
            found_error = gains["difference_standard_error"]
            assert found_error == pytest.approx(expected, rel=0.2, abs=1e-9)
        scores = [found.points[key]["score"] for key in row["keys"]]
        against = [found.points[key]["score"] for key in merge["keys"]]
        assert row["mean"]["difference"] == pytest.approx(np.mean(scores) - np.mean(against))


def test_table_plot_and_page_show_the_controls(finished, plots, tmp_path):
    frame = table.rows(read(finished))
    markdown = (finished / "table.md").read_text()
    for line in frame[frame["control"].notna() & (frame["task"] == "mean")].to_dict("records"):
        own = next(x for x in markdown.splitlines() if x.startswith(f"| {line['row']} |"))
        small = abs(line["difference"]) < 2 * line["difference_standard_error"]
        assert (" ~ |" in own) == (small or line["difference"] == 0)
    assert "Differences are to the row 'best sum in delta space'" in markdown
    assert "difference,difference_standard_error" in (finished / "table.csv").read_text()
    assert "own module left out" in (finished / "report.html").read_text()
    assert run("report", "-r", finished, "-p", tmp_path) == 0
    assert (tmp_path / "controls.png").stat().st_size > 1000


def test_controls_go_on_where_they_stopped(words, finished):
    def points() -> list[dict]:
        return [r for r in json_lines.read(finished / "results.jsonl") if "key" in r]

    before = points()
    assert run(*words, "-p", finished) == 0
    assert points() == before


def trained_on(folder: Path, task: str) -> None:
    """Give a module the record of a training on a task."""
    module = library.load(folder)
    origin = replace(module.provenance, training={"content": {"task": task}})
    replace(module, provenance=origin).save(folder, overwrite=True)


def test_modules_of_one_task_are_averaged_in_their_outputs(tmp_path):
    """Two halves of a task, on two test sets: the ensemble is the mean of their probabilities, and
    no test set is a half's own."""
    halves = sweep_data.make(tmp_path / "bench")
    for path in halves.modules:
        trained_on(path, "mnli")
    other = sweep_data.write_rows(tmp_path / "other.jsonl", 20, seed=3)
    words = (
        "-a", *halves.modules, "--model_name_or_path", halves.base, "--task_name", "mnli", "mnli",
        "--validation_file", halves.validation, other, "--test_file", halves.test, other,
    )  # fmt: skip
    out = tmp_path / "out"
    assert run("sweep", *words, "-p", out, *GRID, "--controls") == 0
    found = read(out)
    rows = rows_of(found)
    assert {"control shrunk 0", "control shrunk 1", "control base"} <= set(rows)
    assert "control own modules" not in rows
    assert "control left out 0" not in rows  # the other one at its coefficient, again
    tokenizer = AutoTokenizer.from_pretrained(halves.base)
    rows_read = json_lines.read(halves.test)
    selecting = [row["label"] for row in json_lines.read(halves.validation)]
    classes = ("entailment", "neutral", "contradiction")
    shares = np.array([selecting.count(name) for name in classes]) / len(selecting)
    mean = 0.0
    for place, path in enumerate(halves.modules):
        model = AutoModelForSequenceClassification.from_pretrained(halves.base, num_labels=3).eval()
        with torch.no_grad(), library.attach(model, library.load(path)):
            pairs = ([r[c] for r in rows_read] for c in ("premise", "hypothesis"))
            encoded = tokenizer(*pairs, padding=True, return_tensors="pt")
            logits = model(**encoded).logits.double()
        mean = mean + logits.softmax(1) / 2
        record = found.points[rows[f"control prior matched {place}"]["keys"][0]]
        alone = matched(logits.numpy())
        assert record["predictions"] == "".join(map(str, alone.argmax(1).tolist()))
        record = found.points[rows[f"control known shares {place}"]["keys"][0]]
        known = matched(logits.numpy(), shares)
        assert record["predictions"] == "".join(map(str, known.argmax(1).tolist()))
        assert record["predictions"] != "".join(map(str, alone.argmax(1).tolist()))
    record = found.points[rows["control ensemble"]["keys"][0]]
    assert record["predictions"] == "".join(map(str, mean.argmax(1).tolist()))


def test_prompted_tasks_have_the_controls_that_need_no_head(tmp_path):
    texts = sweep_data.make_text(tmp_path / "bench")
    for path, task in zip(texts.modules[:2], ("rte", "sst2"), strict=True):
        trained_on(path, task)
    out = tmp_path / "out"
    half = ("--grid", "0.5", "0.5", "0.5", "--space", "delta")
    joint = ("--controls", "--joint_module", texts.modules[3])
    assert run("sweep", *texts.flags("rte", "sst2"), "-p", out, *half, *joint) == 0
    found = read(out)
    rows = rows_of(found)
    assert "control ensemble" not in rows
    keys = [key for name in ("left out", "joint 0") for key in rows[f"control {name}"]["keys"]]
    check_by_hand(texts, [found.points[key] for key in keys])
    base = [found.points[key] for key in rows["control base"]["keys"]]
    assert [r["modules"] for r in base] == [[], []]


def matched(scores: np.ndarray, shares: np.ndarray | None = None) -> np.ndarray:
    """Scores (n, w) moved per answer to the minimum of the convex function whose gradient is the
    mean distribution minus the one that is wanted, else the uniform one."""
    wanted = np.full(scores.shape[1], 1 / scores.shape[1]) if shares is None else shares

    def excess(b: np.ndarray) -> tuple[float, np.ndarray]:
        moved = scores + b
        total = np.logaddexp.reduce(moved, axis=1, keepdims=True)
        return total.mean() - wanted @ b, np.exp(moved - total).mean(0) - wanted

    start = np.zeros(scores.shape[1])
    return scores + optimize.minimize(excess, start, jac=True, options={"gtol": 1e-9}).x


@pytest.mark.parametrize("answers", [2, 3, 7])
def test_matched_priors_are_those_asked_for_whatever_the_scores_and_their_order(answers):
    draw = np.random.default_rng(answers)
    scores = draw.normal(size=(50, answers)) * 8 + draw.normal(size=answers) * 5
    turned = draw.permutation(answers)
    for shares in (None, draw.dirichlet(np.full(answers, 5.0))):
        given = () if shares is None else tuple(shares)
        found, by_hand = scores + (b := matching_prior(scores, given)), matched(scores, shares)
        np.testing.assert_allclose(found - found[:, :1], by_hand - by_hand[:, :1], atol=1e-3)
        again = matching_prior(scores[:, turned], tuple(np.array(given)[turned]) if given else ())
        np.testing.assert_allclose(again, b[turned], atol=1e-5)


ANALOGY = ("--evaluate", "--controls", "--grid", "0.75", "0.25", "0.75")


@pytest.mark.parametrize("kind", ["lora", "ia3", "full"])
def test_an_analogy_is_beside_its_parts_and_the_exchanged_language_models(kind, tmp_path):
    texts = sweep_data.make_text(tmp_path / "bench", kind)
    out = tmp_path / "out"
    assert run("analogy", *texts.flags("rte", "sst2", modules=3), "-p", out, *ANALOGY) == 0
    found = read(out)
    rows = rows_of(found)
    space = "delta" if kind == "lora" else "parameter"
    assert found.summary["controlled"] == f"analogy, selected, {space} space"
    told = {
        "control base": ([], []),
        "control shrunk": (["m1"], [0.75]),
        "control left out": (["m2", "m3"], [0.25, -0.25]),
        "control exchanged": (["m1", "m3", "m2"], [0.75, 0.25, -0.25]),
        "control known shares analogy": (["m1", "m2", "m3"], [0.75, 0.25, -0.25]),
        "control known shares 0": (["m1"], [1.0]),
        "control prior matched analogy": (["m1", "m2", "m3"], [0.75, 0.25, -0.25]),
        "control prior matched 0": (["m1"], [1.0]),
    }
    assert {name for name in rows if name.startswith("control ")} == set(told)
    for name, (modules, coefficients) in told.items():
        records = [found.points[key] for key in rows[name]["keys"]]
        for record in records:
            assert (record["names"], record["coefficients"]) == (modules, coefficients)
        if "matched" not in name and "shares" not in name and modules:
            check_by_hand(texts, records)
    matching = [
        found.points[key] for kind in ("prior matched", "known shares")
        for key in rows[f"control {kind} 0"]["keys"]
    ]  # fmt: skip
    for record in matching:
        hand = Hand(texts.base)
        rows_read = json_lines.read(sweep_by_hand.rows_of(texts, record))
        with torch.no_grad(), library.attach(hand.model, sweep_by_hand.combined(texts, record)):
            words, name = ANSWERS[record["task"]], record["task"]
            sources = [asked(name, row) for row in rows_read]
            scores = [[hand.log_probability(x, word) for word in words] for x in sources]
        selecting = sweep_by_hand.rows_of(texts, record | {"split": "validation"})
        labels = [row["label"] for row in json_lines.read(selecting)]
        shares = np.array([labels.count(n) for n in LABELS[record["task"]]]) / len(labels)
        given = matched(np.array(scores), shares if "shares" in record else None).argmax(1)
        assert record["predictions"] == "".join(map(str, given.tolist()))
    text = table.markdown(found)
    assert "minus the analogy" in text
    assert "minus the merge" not in text


@pytest.mark.parametrize(
    ("program", "head", "space", "kind"),
    [
        ("analogy", "first", "delta", "lora"),  # language models without a head, or with another
        ("analogy", "last", "delta", "lora"),
        ("analogy", "average", "log", "ia3"),
        ("sweep", "average", "parameter", "lora"),
    ],
)
def test_controls_are_answered_with_the_head_of_what_they_are_controls_of(
    program, head, space, kind, tmp_path
):
    halves = sweep_data.make(tmp_path / "bench", kind)
    paths = (*halves.modules, halves.full_set)
    if head == "first":
        target, source = map(library.load, paths[1:])
        bare = replace(target, tensors=target.adapter_tensors(), head=None)
        for module, path in zip((bare, own_heads.own_head(source, "rte")), paths[1:], strict=True):
            module.save(path, overwrite=True)
    out, grid = tmp_path / "out", ("--grid", "0", "0.25", "1")
    own = ("--head", head, "--space", space, "--evaluate" if program == "analogy" else "--use_cpu")
    flags = ("-a", *paths, *halves.flags()[3:], "-p", out, *grid, *own, "--controls")
    assert run(program, *flags) == 0
    found = read(out)
    rows, modules = rows_of(found), [library.load(path) for path in paths]
    c, d, e = rows[found.summary["controlled"]]["coefficients"]
    told = {"base": [0, 0, 0], "shrunk": [c, 0, 0], "left out": [0, d, e], "exchanged": [c, e, d]}
    if program == "sweep":
        told = {"base": [0, 0, 0], "shrunk 1": [0, d, 0], "left out 0": [0, d, e]}
    answering = library.combine(modules, [c, d, e], space=space, head=head).head_tensors()
    model = AutoModelForSequenceClassification.from_pretrained(halves.base, num_labels=3).eval()
    model.load_state_dict(answering, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(halves.base)
    rows_read = json_lines.read(halves.test)
    pairs = ([r[column] for r in rows_read] for column in ("premise", "hypothesis"))
    encoded = tokenizer(*pairs, padding=True, return_tensors="pt")
    for name, coefficients in told.items():
        # A module alone is exact; in parameter space its factors would be scaled twice.
        by = "delta" if name.startswith("shrunk") and kind == "lora" else space
        whole = library.combine(modules, coefficients, space=by, head="none")
        with torch.no_grad(), library.attach(model, whole):
            given = model(**encoded).logits.argmax(1).tolist()
        record = found.points[rows[f"control {name}"]["keys"][0]]
        assert record["predictions"] == "".join(map(str, given)), name
    with torch.no_grad(), library.attach(model, modules[0]):
        logits = model(**encoded).logits.numpy()
    record = found.points[rows["control prior matched 0"]["keys"][0]]
    given = matched(logits).argmax(1).tolist()
    assert record["predictions"] == "".join(map(str, given))
    assert given != logits.argmax(1).tolist()


def test_an_analogy_has_no_head_per_task(tmp_path, capsys):
    tasks = own_heads.make(tmp_path / "bench")
    capsys.readouterr()
    words = ("analogy", *tasks.flags(), "--evaluate", *GRID, "--head", "per-task")
    message = refused(capsys, tmp_path, *words)
    assert "an analogy whose head is of several tasks cannot be scored" in message


def test_a_joint_module_without_a_head_for_each_task_is_refused(bench, tmp_path, capsys):
    words = ("--joint_module", bench.modules[0])
    own = ("sweep", *bench.flags(), *GRID, "--head", "per-task")
    message = refused(capsys, tmp_path, *own, "--controls", *words)
    assert "rte for stsb: no head of the module answers the task" in message
    assert "pem refit" in message
    message = refused(capsys, tmp_path, *own, *words)
    assert "--joint_module: has no effect without --controls" in message


# --- new last layers ---


def refitted_by_hand(bench, task, folder, file, rows, head) -> float:
    """The score that pem refit and pem evaluate give a module on the rows."""
    new, scores = (folder.with_name(f"{folder.name} {task} {what}") for what in ("new", rows.name))
    common = ["--model_name_or_path", bench.base, "--task_name", task, "--adapter"]
    assert run("refit", *common, folder, "--train_file", file, "--max_samples", 50,
               "--output_dir", new, "--overwrite") == 0  # fmt: skip
    assert run("evaluate", *common, new, "--validation_file", rows, "--output_dir", scores,
               *head) == 0  # fmt: skip
    metric = "eval_pearson" if task == "stsb" else "eval_accuracy"
    return json.loads((scores / "eval_results.json").read_text())[metric]


def test_a_refitted_score_is_that_of_pem_refit_and_pem_evaluate(bench, finished, train, tmp_path):
    found = read(finished)
    rows = rows_of(found)
    merged, c = tmp_path / "merged", controlled(found)["coefficients"]
    assert run("merge", "-a", *bench.modules, "-p", merged, "--coefficients", *c, "--space",
               "delta", "--head", "per-task") == 0  # fmt: skip
    cases = {
        found.summary["controlled"]: [merged] * 2,
        "control own modules": list(bench.modules),
    }
    for name, folders in cases.items():
        row = rows[name]
        scores = [found.points[key]["score"] for key in row["refit_keys"]]
        assert row["mean"]["refit"] == pytest.approx(np.mean(scores))
        for task, folder, file, score in zip(bench.tasks, folders, train, scores, strict=True):
            head = ["--head", task] if folder == merged else []
            rows_of_task = bench.rows[task, "test"]
            expected = refitted_by_hand(bench, task, folder, file, rows_of_task, head)
            assert score == pytest.approx(expected, abs=1e-5), (name, task)
    frame = table.rows(found)
    merge = frame[(frame["id"] == found.summary["controlled"]) & (frame["task"] == "mean")].iloc[0]
    other = frame[(frame["id"] == "control base") & (frame["task"] == "mean")].iloc[0]
    assert other["refit_difference"] == pytest.approx(other["refit"] - merge["refit"])
    assert "with new heads" in (finished / "table.md").read_text()
    assert "refit,refit_standard_error" in (finished / "table.csv").read_text()


def test_points_are_chosen_by_the_scores_that_new_last_layers_give(bench, words, train, tmp_path):
    """Each as pem refit and pem evaluate give it on the rows that are selected on."""
    plain = [w for w in words if w not in ("--controls", "--joint_module")]
    out = tmp_path / "out"
    asked = [w for w in plain if not str(w).endswith("joint")]
    assert run(*asked, "--refit_select", "-p", out) == 0
    found = read(out)
    study = next(s for s in found.summary["studies"] if s["space"] == "delta")
    means = {}
    for keys in study["keys_of_trials"]:
        records = [found.points[key] for key in keys]
        assert all(r["refit"] and r["split"] == "validation" for r in records)
        merged, c = tmp_path / f"{len(means)}", records[0]["coefficients"]
        assert run("merge", "-a", *bench.modules, "-p", merged, "--coefficients", *c, "--space",
                   "delta", "--head", "per-task") == 0  # fmt: skip
        for task, file, record in zip(bench.tasks, train, records, strict=True):
            rows = bench.rows[task, "validation"]
            expected = refitted_by_hand(bench, task, merged, file, rows, ["--head", task])
            assert record["score"] == pytest.approx(expected, abs=1e-5), (c, task)
        means[tuple(c)] = np.mean([r["score"] for r in records])
    assert len(means) == 2
    assert tuple(study["coefficients"]) == max(means, key=means.__getitem__)
    assert "chosen by mean with new heads on" in (out / "table.md").read_text()


def test_new_last_layers_need_heads(tmp_path, capsys):
    texts = sweep_data.make_text(tmp_path / "bench")
    capsys.readouterr()
    message = refused(capsys, tmp_path, "sweep", *texts.flags("rte"), *GRID, "--refit", "50")
    assert "--refit: fits last layers of classification heads" in message


def test_new_last_layers_say_that_they_saw_the_rows_and_refuse_too_few_before_any_result(
    bench, tmp_path, capsys
):
    rows = bench.rows["rte", "validation"]
    words = (
        "sweep", "-a", bench.modules[0], bench.modules[0], "--model_name_or_path", bench.base,
        "--task_name", "rte", "--validation_file", rows, "--train_file", rows, *GRID,
    )  # fmt: skip
    message = refused(capsys, tmp_path, *words, "--refit", 4)
    assert "--refit 4: rte: too few rows of class" in message and "--penalty" not in message
    named = ("-a", *bench.modules[:1] * 2, "--model_name_or_path", bench.base)
    asked = ("sweep", *named, "--validation_file", rows, "--refit", 4)
    assert "--refit: no training rows of" in refused(capsys, tmp_path, *asked, *GRID)
    assert run(*words, "--refit", 99, "-p", tmp_path / "out") == 0
    count = len(rows.read_text().splitlines())
    assert read(tmp_path / "out").summary["refit_shared_rows"] == [count]
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"{count} of the {count} rte rows of the table are among those, so the scores" in table
