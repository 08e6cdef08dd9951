"""Who comes from the paper's published code: old programs, flags and names lead somewhere."""

from __future__ import annotations

import csv
import importlib
import json
import re

import numpy as np
import pytest
from support import unlearning_data
from support.jsonl import write_jsonl

import pem_composition as pem
from pem_composition import cli
from pem_composition.cli import former
from pem_composition.evaluation.toxicity import load_judge

FOLDER = "exps/composition_for_unlearning"


@pytest.fixture(scope="module")
def table(repository) -> str:
    return (repository / "docs" / "reference_code.md").read_text(encoding="utf-8")


def test_what_the_table_points_to_is_there(table, repository):
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    for there, here in ((there, here) for there, here in rows if "/" in there + here):
        for path in re.findall(r"`((?:exps|pem_composition)/[\w/.]+)`", here):
            assert (repository / path).exists(), path
        if "the same name" in here:
            folder, *names = re.findall(r"`([\w/.]+)`", there)
            files = [f"{folder}{name}" for name in names] or [folder]
            assert all((repository / file).is_file() for file in files), files
    named = set(re.findall(r"`pem (\w+)", table))
    assert named and named <= set(cli.SUBCOMMANDS)


def test_every_flag_that_was_renamed_is_in_the_table(table):
    listed = set(re.findall(r"`--(\w+)", table.split("## Flags")[1]))
    assert former.RENAMED.keys() | former.GONE.keys() <= listed


@pytest.mark.parametrize(
    ("program", "words", "name"),
    [
        ("train", ["--load_adapter", "x"], "its name here is --init_from"),
        ("evaluate", ["--load_adapter", "x"], "its name here is --adapter\n"),
        ("generate", ["--k", "0"], "its name here is --top_k"),
        ("train", ["--train_adapter"], "leave it out: --adapter_config says"),
    ],
)
def test_a_former_flag_is_answered_with_its_name(program, words, name, capsys):
    assert cli.main([program, *words]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "answer"),
    [("rte-all-0.json", "half-0.jsonl"), ("toxic_seed_v1_t.json", "docs/reference_code.md")],
)
def test_a_file_that_the_published_code_names_says_how_to_come_by_it(
    file, answer, capsys, tmp_path
):
    assert cli.main(["select", "--input_file", file, "--output_dir", str(tmp_path / "out")]) == 2
    assert answer in capsys.readouterr().err


@pytest.mark.slow
def test_the_programs_of_the_unlearning_folder_run_by_their_old_flags(
    tmp_path, repository, monkeypatch, capsys, one_thread
):
    monkeypatch.syspath_prepend(str(repository / FOLDER))
    names = ("run_clm_noconcat", "gpt2_scale", "run_prediction", "compute_ppl")
    clm, scale, prediction, ppl = (importlib.import_module(name).main for name in names)
    bench = unlearning_data.make(tmp_path, "gpt2")
    base = ["--model_name_or_path", str(bench.base)]

    words = "--train_adapter --adapter_config ia3 --do_train --save_strategy steps --max_steps 1"
    comments = write_jsonl(tmp_path / "c.jsonl", [{"text": "bad sad"}] * 8)
    out = ["--train_file", str(comments), "--output_dir", str(tmp_path / "toxic")]
    assert clm([*base, *words.split(), *out]) == 0
    trained = pem.load(tmp_path / "toxic")
    assert trained.kind == "ia3" and "to be subtracted" in str(trained.provenance.notes)

    texts = tmp_path / "texts.txt"
    words = f"--negation --scale 0.7 --model_type gpt2 --num 5 --length 12 --save_dir {texts}"
    where = ["--load_adapter", str(bench.module), "--model_save_dir", str(tmp_path / "negated")]
    assert scale([*base, *words.split(), *where, "--prompt", "good fine"]) == 0
    module = tmp_path / "negated" / "civil_comments"
    expected = pem.negate(pem.load(bench.module), 0.7).tensors
    written = pem.load(module).tensors
    assert all(written[name].equal(value) for name, value in expected.items())
    rows = [json.loads(line) for line in texts.with_suffix(".jsonl").open(encoding="utf-8")]
    assert texts.read_text().splitlines() == [row["text"].replace("\n", "") for row in rows]
    assert len(rows) == 5

    capsys.readouterr()
    table = tmp_path / "scores.csv"
    judge = ["--from_ckpt_path", str(bench.judge), "--save_to", str(table)]
    assert prediction(["--input", str(texts), *judge]) == 0
    scores = load_judge(bench.judge).score([row["text"] for row in rows])
    assert float(capsys.readouterr().out) == pytest.approx(float(np.mean(scores)))
    with table.open(newline="") as file:
        shown = [float(row["toxicity"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(shown, scores, atol=1e-5)

    asked = ["--text_file", str(bench.text), "--window", "16", "--stride", "8"]
    assert ppl([*base, "--load_adapter", str(module), *asked]) == 0
    old = capsys.readouterr().out
    assert cli.main(["perplexity", *base, "--adapter", str(module), *asked]) == 0
    assert capsys.readouterr().out == old
