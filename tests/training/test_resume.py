"""Killed, stopped and resumed runs end where an uninterrupted one ends, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import zipfile

import pytest

from pem_composition.errors import CheckpointError, UsageError
from pem_composition.safe_files import sha256_file
from pem_composition.training import checkpointing, resume, runs
from pem_composition.training.identity import describe_run
from pem_composition.training.runs import trained_objective

pytestmark = pytest.mark.slow


def losses(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {e["step"]: e["loss"] for e in log if "loss" in e}


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def identity_of(config):
    objective = trained_objective(config)
    data = runs.read_data(config, objective)
    return describe_run(config, data, objective.content(data.task))


def assert_same(folder, reference):
    assert weights(folder) == weights(reference)
    assert losses(folder) == losses(reference)
    results = [json.loads((f / "all_results.json").read_text()) for f in (folder, reference)]
    timed = {"train_runtime", "eval_runtime"}
    assert {k: v for k, v in results[0].items() if k not in timed} == {
        k: v for k, v in results[1].items() if k not in timed
    }


def test_a_killed_run_resumes_from_the_newest_complete_checkpoint(bench, reference):
    """LoRA and base dropout are on: the random state is restored, not only the weights."""
    output = bench.folder / "killed"
    child = bench.start("killed", save_steps=3)
    child.wait_for(output / "checkpoint-12")
    child.process.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (output / "pem.json").exists()
    again = bench.start("killed", save_steps=3)
    assert again.wait() == 0, again.text()
    assert "resuming from" in again.text()
    assert weights(output) == weights(reference)
    assert not list(output.glob(".checkpoint-*"))
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 40


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_is_not_disturbed(
    bench, reference, monkeypatch
):
    """It took for left behind what the first one was writing, and missed what the first removed."""
    monkeypatch.setattr(checkpointing, "PATIENCE", 0.0)
    output = bench.folder / "twice"
    child = bench.start("twice", save_steps=3)
    child.wait_for(output / "checkpoint-3")
    config = bench.config(str(output), save_steps=3)
    with pytest.raises(UsageError, match="twice: another process trains into it"):
        runs.run(config)
    assert child.wait() == 0, child.text()
    assert weights(output) == weights(reference)
    assert runs.run(config).skipped


def test_a_folder_that_was_made_to_be_held_goes_with_what_is_refused(tmp_path):
    output = tmp_path / "not" / "there"
    with pytest.raises(ZeroDivisionError), checkpointing.alone(output):
        assert output.is_dir()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_at_the_end_of_the_step_and_exits_75(bench, reference, name):
    output = bench.folder / name
    child = bench.start(name, eval_steps=20, save_steps=7)
    child.wait_for(output / "checkpoint-7")
    os.kill(child.process.pid, getattr(signal, name))
    assert child.wait() == 75, child.text()
    assert (
        child.text()
        .strip()
        .splitlines()[-1]
        .startswith(f"pem train: error: {name}: stopped after step ")
    )
    stopped = checkpointing.all_of(output)[0]
    step = checkpointing.read_marker(stopped)["step"]
    assert 7 <= step < 40
    again = bench.start(name, eval_steps=20, save_steps=7)
    assert again.wait() == 0, again.text()
    assert f"resuming from {stopped}" in again.text()
    assert weights(output) == weights(reference)


def test_an_incomplete_checkpoint_is_skipped_with_one_line_and_the_older_one_resumed(
    bench, reference
):
    output = bench.folder / "incomplete"
    shutil.copytree(reference, output)
    for name in ("pem.json", "adapter_model.safetensors", "adapter_config.json"):
        (output / name).unlink()
    (output / "checkpoint-40" / checkpointing.MARKER).unlink()
    lines = []
    outcome = runs.run(bench.config("incomplete"), lines.append)
    skipped = [line for line in lines if "incomplete checkpoint" in line]
    assert len(skipped) == 1
    assert "checkpoint-40" in skipped[0] and "complete.json is missing" in skipped[0]
    assert any("resuming from" in line and "checkpoint-20" in line for line in lines)
    assert weights(outcome.output_dir) == weights(reference)
    assert_same(output, reference)


def test_a_damaged_checkpoint_counts_as_incomplete(bench, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "out")
    damaged = tmp_path / "out" / "checkpoint-40" / "optimizer.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    lines = []
    assert (
        checkpointing.newest_complete(tmp_path / "out", lines.append)
        == tmp_path / "out" / "checkpoint-20"
    )
    assert len(lines) == 1 and "optimizer.pt has changed" in lines[0]


def test_a_malicious_optimizer_state_is_never_run(bench, reference, tmp_path, monkeypatch):
    """Even with its sha256 in the marker: the state is read as tensors only."""
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out"
    shutil.copytree(reference / "checkpoint-20", output / "checkpoint-20")
    with zipfile.ZipFile(output / "checkpoint-20" / "optimizer.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"cposix\nsystem\nX\x0e\0\0\0touch executed\x85R.")
        archive.writestr("archive/version", b"3\n")
    marker = output / "checkpoint-20" / checkpointing.MARKER
    recorded = json.loads(marker.read_text())
    recorded["files"]["optimizer.pt"] = sha256_file(output / "checkpoint-20" / "optimizer.pt")
    marker.write_text(json.dumps(recorded))
    with pytest.raises(CheckpointError, match=r"checkpoint-20.* cannot be resumed from"):
        runs.run(bench.config(str(output)))
    assert not (tmp_path / "executed").exists()
    assert [p.name for p in output.iterdir()] == ["checkpoint-20"]


def test_a_checkpoint_of_the_last_step_needs_no_training(bench, reference):
    output = bench.folder / "finished"
    shutil.copytree(reference, output)
    (output / "pem.json").unlink()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (output / name).unlink()
    runs.run(bench.config("finished"))
    assert_same(output, reference)


def test_a_finished_run_is_skipped_and_another_seed_is_not(bench, reference):
    lines = []
    assert runs.run(bench.config("reference"), lines.append).skipped
    assert lines == [f"{reference}: already holds the result of this run, skipped"]
    identity = identity_of(bench.config("reference", seed=1))
    lines.clear()
    assert (
        resume.find_resume(bench.config("reference"), identity, lines.append, finished=True) is None
    )
    assert "--seed 42 -> 1" in lines[0] and "training anew" in lines[0]


def test_a_full_disk_ends_the_run_with_exit_3_and_keeps_the_older_checkpoint(bench, reference):
    """A limit on file sizes stands in for the full disk: the optimizer's state does not fit."""
    folder = bench.folder / "full"
    shutil.copytree(reference / "checkpoint-20", folder / "checkpoint-20")
    size = (folder / "checkpoint-20" / "optimizer.pt").stat().st_size
    child = bench.start("full", file_limit=size - 1000)
    assert child.wait() == 3
    last = child.text().strip().splitlines()[-1]
    assert last.startswith(
        f"pem train: error: {folder}/checkpoint-40: cannot write the checkpoint"
    ), last
    assert [p.name for p in folder.iterdir()] == ["checkpoint-20"]
    checkpointing.read_marker(folder / "checkpoint-20")


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("learning_rate", 5e-3, "--learning_rate 0.01 -> 0.005"),
        ("seed", 7, "--seed 42 -> 7"),
        ("per_device_train_batch_size", 8, "--per_device_train_batch_size 16 -> 8"),
        ("max_train_samples", 100, "train rows"),
    ],
)
def test_resume_refuses_changed_settings_unless_forced(
    bench, reference, tmp_path, flag, value, shown
):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(reference / "checkpoint-20", unfinished / "checkpoint-20")
    with pytest.raises(UsageError) as error:
        runs.run(bench.config(str(unfinished), **{flag: value}))
    assert shown in str(error.value) and "--force_resume" in str(error.value)
    assert [p.name for p in unfinished.iterdir()] == ["checkpoint-20"]
    forced = bench.config(str(unfinished), **{flag: value}, force_resume=True)
    identity = identity_of(forced)
    lines = []
    found = resume.find_resume(forced, identity, lines.append, finished=False)
    assert found == unfinished / "checkpoint-20" and shown in lines[0]


@pytest.mark.parametrize("word", ["true", "True", "false"])
def test_true_is_the_newest_checkpoint_as_in_the_scripts_of_transformers(
    bench, reference, tmp_path, word
):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(reference / "checkpoint-20", unfinished / "checkpoint-20")
    config = bench.config(str(unfinished), resume_from_checkpoint=word)
    found = resume.find_resume(config, identity_of(config), print, finished=False)
    assert found == (unfinished / "checkpoint-20" if word != "false" else None)


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("lora_r", 4, "--lora_r 8 -> 4"),
        ("freeze", "lora_A", "--freeze None -> lora_A"),
        ("optim", "adafactor", "--optim None -> adafactor"),
    ],
)
def test_another_module_or_optimizer_cannot_be_forced_on_a_checkpoint(
    bench, reference, tmp_path, flag, value, shown
):
    """A factor that has moved is not one that stayed; moments of one optimizer are not another's.

    With --freeze or --optim changed a forced resume ended in the optimizer, with its own error.
    """
    shutil.copytree(reference / "checkpoint-20", tmp_path / "checkpoint-20")
    with pytest.raises(UsageError, match=shown) as error:
        runs.run(bench.config(str(tmp_path), **{flag: value}, force_resume=True))
    assert "--force_resume" not in str(error.value)


def test_a_forced_resume_uses_the_new_rate(bench, reference, tmp_path):
    """The checkpoint's own rate would be restored with the optimizer and the new one ignored."""
    shutil.copytree(reference / "checkpoint-20", tmp_path / "checkpoint-20")
    config = bench.config(str(tmp_path), learning_rate=4e-2, force_resume=True)
    runs.run(config)
    logs = [
        {
            e["step"]: e["learning_rate"]
            for e in json.loads((f / "trainer_state.json").read_text())["log_history"]
            if "learning_rate" in e
        }
        for f in (reference, tmp_path)
    ]
    assert logs[1][20] == logs[0][20]
    assert logs[1][30] == pytest.approx(4 * logs[0][30], rel=1e-3)


def test_a_foreign_module_is_not_overwritten_unasked(bench, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"already holds a module.*--overwrite_output_dir"):
        runs.run(bench.config(str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]


def test_a_run_of_another_kind_leaves_nothing_of_the_old_one(bench, tmp_path):
    """transformers would load the adapter of the old run on top of the whole model of the new."""
    out = tmp_path / "run"
    scored = {"max_steps": 2}
    runs.run(bench.config(str(out), **scored))
    (out / "notes.txt").write_text("mine")
    assert (out / "adapter_config.json").exists() and (out / "eval_results.json").exists()
    unscored = {"validation_file": None, "eval_steps": None}
    whole = {"adapter_config": "fft", "max_steps": 2, **unscored}
    runs.run(bench.config(str(out), **whole))
    runs.run(bench.config(str(tmp_path / "clean"), **whole))
    names = [{p.name for p in folder.iterdir()} for folder in (out, tmp_path / "clean")]
    assert names[0] == names[1] | {"notes.txt"}
    runs.run(bench.config(str(out), **scored))
    assert not (out / "model.safetensors").exists() and not (out / "config.json").exists()
