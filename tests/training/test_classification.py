"""Every kind of module trains, is written whole, and starts where it is told to start."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from support.training_bench import write_rows

from pem_composition import checkpoint
from pem_composition.cli import main
from pem_composition.errors import IncompatibleModules, UsageError
from pem_composition.training import checkpointing, execution, initial, preparation, runs

FILES = {
    "README.md",
    "all_results.json",
    "eval_results.json",
    "train_results.json",
    "trainer_state.json",
    "pem.json",
}


def results(folder, name="all_results.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def lora(bench):
    return runs.run(bench.config("lora", max_steps=80, eval_steps=40)).output_dir


@pytest.mark.slow
def test_lora_learns_and_writes_the_files_of_the_example_programs(bench, lora):
    assert {p.name for p in lora.iterdir()} >= FILES | {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    scores = results(lora)
    assert scores["eval_auc"] > 0.7
    assert scores["eval_samples"] == 60 and scores["train_samples"] == 203
    assert sum(scores["eval_predicted_shares"].values()) == pytest.approx(1)
    assert scores["eval_stderr"] == pytest.approx(
        math.sqrt(scores["eval_accuracy"] * (1 - scores["eval_accuracy"]) / 60)
    )
    record = results(lora, "pem.json")
    assert record["training"]["flags"]["learning_rate"] == 1e-2
    assert record["training"]["scores"]["eval_accuracy"] == scores["eval_accuracy"]
    assert record["init"] and record["base"]["fingerprint"]
    assert record["head"]["labels"] == ["negative", "positive"]
    assert record["expression"] == "lora"


@pytest.mark.slow
def test_the_written_module_is_the_evaluated_one(bench, lora):
    """Independent oracle: plain PEFT gives the reported accuracy and loss from the files alone."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(bench.base, num_labels=2)
    model = PeftModel.from_pretrained(base, lora).eval()
    tokenizer = AutoTokenizer.from_pretrained(bench.base)
    rows = [json.loads(line) for line in bench.validation.read_text().splitlines()]
    batch = tokenizer([r["sentence"] for r in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([r["label"] for r in rows])
    with torch.no_grad():
        logits = model(**batch).logits
    scores = results(lora)
    assert (logits.argmax(-1) == labels).float().mean().item() == pytest.approx(
        scores["eval_accuracy"]
    )
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(
        scores["eval_loss"], abs=1e-5
    )


@pytest.mark.slow
def test_equal_flags_give_equal_bits_and_equal_losses(bench, lora):
    again = runs.run(bench.config("lora-again", max_steps=80, eval_steps=40)).output_dir
    assert (again / "adapter_model.safetensors").read_bytes() == (
        lora / "adapter_model.safetensors"
    ).read_bytes()
    logs = [
        [e.get("loss") for e in results(f, "trainer_state.json")["log_history"]]
        for f in (lora, again)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_the_step_with_the_best_metric_is_kept_and_said_to_be_chosen(bench):
    said: list[str] = []
    config = bench.config("best", max_steps=60, eval_steps=10, save_total_limit=1)
    folder = runs.run(config, said.append).output_dir
    log = [e for e in results(folder, "trainer_state.json")["log_history"] if "eval_accuracy" in e]
    assert len(log) == 6
    best = max(log, key=lambda e: e["eval_accuracy"])
    assert results(folder)["eval_accuracy"] == best["eval_accuracy"]
    assert results(folder)["best_step"] == best["step"]
    assert results(folder)["best_of"] == 6
    assert f"eval is of step {best['step']}, the best of 6 on these rows, so it is opti" in said[-1]
    for alone in (0, 1):
        assert "optimistic" not in execution.summary(results(folder) | {"best_of": alone})
    kept = {p.name for p in checkpointing.all_of(folder)}
    assert kept == {f"checkpoint-{best['step']}", "checkpoint-60"}
    saved = checkpoint.load(folder / f"checkpoint-{best['step']}")
    final = checkpoint.load(folder)
    assert all(torch.equal(saved.tensors[n], final.tensors[n]) for n in final.tensors)


@pytest.mark.slow
def test_ia3_trains_without_decay_towards_zero(bench):
    """Weight decay alone (a rate of almost zero, a huge decay) must not move the vectors."""
    config = bench.config(
        "ia3",
        adapter_config="ia3",
        lora_dropout=None,
        max_steps=20,
        learning_rate=1e-12,
        weight_decay=1e9,
    )
    module = runs.train(config)
    vectors = torch.cat(list(module.adapter_tensors().values()))
    torch.testing.assert_close(vectors, torch.ones_like(vectors), rtol=0, atol=1e-6)
    trained = runs.train(
        bench.config("ia3-lr", adapter_config="ia3", learning_rate=2e-2, max_steps=20)
    )
    assert max((t - 1).abs().max() for t in trained.adapter_tensors().values()) > 1e-2


@pytest.mark.slow
def test_fft_writes_a_hugging_face_model_that_differs_from_its_base(bench):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = bench.config(
        "fft", adapter_config="fft", learning_rate=1e-3, max_steps=20, save_total_limit=1
    )
    module = runs.train(config)
    folder = bench.folder / "fft"
    assert {p.name for p in folder.iterdir()} >= FILES | {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    base, tuned = (
        load_file(bench.base / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    name = "encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(
        module.tensors[f"bert.{name}.delta"], tuned[f"bert.{name}"] - base[name], rtol=0, atol=1e-7
    )
    assert results(folder, "pem.json")["training"]["key"]
    argv = ["evaluate", "--task_name", "sst2", "--validation_file", str(bench.validation)]
    for name, model in (("a", [str(folder)]), ("b", [str(bench.base), "--adapter", str(folder)])):
        out = bench.folder / f"fft-evaluation-{name}"
        assert main([*argv, "--output_dir", str(out), "--model_name_or_path", *model]) == 0
        scored = results(out)
        assert scored["eval_accuracy"] == results(folder)["eval_accuracy"]
        assert scored["eval_loss"] == pytest.approx(results(folder)["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_regression_learns_and_reports_correlations(bench):
    train = write_rows(bench.folder / "scores.jsonl", 400, seed=3, regression=True)
    dev = write_rows(bench.folder / "scores-dev.jsonl", 50, seed=4, regression=True)
    config = bench.config(
        "stsb",
        task_name="stsb",
        train_file=train,
        validation_file=dev,
        max_steps=100,
        group_by_length=True,
    )
    folder = runs.run(config).output_dir
    scores = results(folder)
    assert scores["eval_pearson"] > 0.3
    assert set(scores) >= {"eval_spearmanr", "eval_stderr", "eval_loss"}
    assert scores["eval_predicted_shares"] == {} and not scores["eval_degenerate"]


@pytest.mark.slow
def test_scoring_another_split_later_does_not_train_again(bench, lora):
    """--do_predict changes what is reported of a finished run, not the run."""
    before = (lora / "adapter_model.safetensors").read_bytes()
    lines = []
    test = write_rows(bench.folder / "test.jsonl", 30, seed=9)
    flags = {"max_steps": 80, "eval_steps": 40}
    runs.run(bench.config("lora", **flags, do_predict=True, test_file=test), lines.append)
    assert any("resuming from" in line and "checkpoint-80" in line for line in lines), lines
    assert (lora / "adapter_model.safetensors").read_bytes() == before
    assert results(lora)["test_samples"] == 30 and results(lora)["eval_samples"] == 60


@pytest.mark.slow
def test_a_damaged_result_is_made_again(bench):
    config = bench.config("damaged", max_steps=4, eval_steps=None)
    folder = runs.run(config).output_dir
    good = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(good[:-8] + bytes(8))
    assert not runs.run(config).skipped
    assert (folder / "adapter_model.safetensors").read_bytes() == good
    assert runs.run(config).skipped


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric_for_best_model": "f1"}, ("--metric_for_best_model", "f1", "accuracy, loss")),
        ({"warmup_steps": 40}, ("--warmup_steps", "40")),
        ({"output_dir": "."}, ("--output_dir", "working directory")),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_first_step(bench, changes, words):
    with pytest.raises(UsageError) as error:
        runs.run(bench.config("refused", **changes))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (bench.folder / "refused").exists()


@pytest.mark.slow
def test_divergence_stops_the_run_and_writes_no_broken_weights(bench):
    child = bench.start("diverged", learning_rate=1e30, eval_steps=1)
    assert child.wait() == 3
    last = child.text().strip().splitlines()[-1]
    assert last.startswith("pem train: error: step ") and "lower --learning_rate" in last
    assert "nan" in last or "inf" in last
    folder = bench.folder / "diverged"
    assert not (folder / "pem.json").exists()
    for saved in folder.rglob("*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(saved).values())


@pytest.mark.slow
@pytest.mark.parametrize("moment", [(preparation, "prepare"), (initial.results, "read_training")])
@pytest.mark.parametrize(("other_seed", "code"), [("3", 0), ("4", 2)])
def test_two_processes_that_draw_one_initial_module_both_succeed(
    other_seed, code, moment, bench, tmp_path, monkeypatch, capsys
):
    """The other one publishes while this one draws, or looks; another module there is refused."""
    argv = ["init", "--model_name_or_path", str(bench.base), "--task_name", "sst2"]
    argv += ["--output_dir", str(tmp_path / "init"), "--seed"]
    own = getattr(*moment)

    def meanwhile(*given):
        monkeypatch.setattr(*moment, own)
        found = own(*given)
        assert main([*argv, other_seed]) == 0
        capsys.readouterr()
        return found

    monkeypatch.setattr(*moment, meanwhile)
    assert main([*argv, "3"]) == code
    said = capsys.readouterr()
    assert ("skipped" in said.out) == (code == 0)
    assert ("is not empty" in said.err) == (code == 2)


@pytest.mark.slow
def test_runs_start_from_the_given_module_and_carry_its_fingerprint(bench, capsys):
    folder = bench.folder / "init"
    argv = [
        "init",
        "--model_name_or_path",
        str(bench.base),
        "--task_name",
        "sst2",
        "--output_dir",
        str(folder),
    ]
    assert main([*argv, "--seed", "3"]) == 0
    initial = checkpoint.load(folder)
    fingerprint = initial.provenance.init
    assert fingerprint and fingerprint[:12] in capsys.readouterr().out
    assert main([*argv, "--seed", "3"]) == 0
    assert "skipped" in capsys.readouterr().out
    assert main([*argv, "--seed", "4"]) == 2
    quick = {
        "init_from": folder,
        "max_steps": 2,
        "eval_steps": None,
        "learning_rate": 1e-12,
        "weight_decay": 0,
    }
    started = [runs.train(bench.config(f"from-init-{seed}", seed=seed, **quick)) for seed in (1, 2)]
    assert {run.provenance.init for run in started} == {fingerprint}
    for name, tensor in started[0].tensors.items():
        torch.testing.assert_close(tensor, initial.tensors[name], rtol=0, atol=1e-9)
    assert (
        runs.train(bench.config("own-init", **(quick | {"init_from": None}))).provenance.init
        != fingerprint
    )
    with pytest.raises(IncompatibleModules, match=r"--lora_r; found 8, expected 4"):
        runs.run(bench.config("wrong-rank", **quick, lora_r=4))
    assert not (bench.folder / "wrong-rank").exists()


@pytest.mark.slow
def test_a_whole_model_starts_from_an_initial_one_and_refuses_a_module(bench, lora):
    folder = bench.folder / "init-fft"
    argv = ["init", "--model_name_or_path", str(bench.base), "--num_labels", "2", "--seed", "5"]
    assert main([*argv, "--adapter_config", "fft", "--output_dir", str(folder)]) == 0
    quick = {"adapter_config": "fft", "max_steps": 1, "eval_steps": None, "learning_rate": 1e-12}
    config = bench.config("fft-from-init", **quick, weight_decay=0, init_from=folder)
    start, end = (load_file(f / "model.safetensors") for f in (folder, runs.run(config).output_dir))
    for name, tensor in start.items():
        torch.testing.assert_close(end[name], tensor, rtol=0, atol=1e-8)
    with pytest.raises(IncompatibleModules, match="a whole model"):
        runs.run(bench.config("fft-from-lora", **quick, init_from=lora))


@pytest.mark.slow
def test_evaluate_scores_modules_and_whole_models_as_training_did(bench, lora, capsys):
    out = bench.folder / "evaluation"
    argv = [
        "evaluate",
        "--task_name",
        "sst2",
        "--validation_file",
        str(bench.validation),
        "--output_dir",
        str(out),
    ]
    assert main([*argv, "--model_name_or_path", str(bench.base), "--adapter", str(lora)]) == 0
    assert "share positive" in capsys.readouterr().out
    mine, theirs = results(out, "eval_results.json"), results(lora, "eval_results.json")
    for name in (
        "eval_accuracy",
        "eval_auc",
        "eval_stderr",
        "eval_samples",
        "eval_predicted_shares",
    ):
        assert mine[name] == theirs[name]
    assert main([*argv, "--model_name_or_path", str(bench.base)]) == 0
    assert "newly initialised" in capsys.readouterr().out
    assert (
        main(
            [
                *argv,
                "--model_name_or_path",
                str(bench.base),
                "--adapter",
                str(bench.folder / "nothing"),
            ]
        )
        == 2
    )
