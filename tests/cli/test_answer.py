"""``pem answer`` and ``pem select``: what they write, and what they refuse in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.jsonl import read_jsonl, write_jsonl
from support.texts import answers
from support.tiny_models import random_module, tiny, write_causal

from pem_composition import checkpoint
from pem_composition.checkpoint import base_identity
from pem_composition.evaluation.decoding import BeamSearch
from pem_composition.evaluation.models import load_causal
from pem_composition.tasks.instruction_rows import examples_of, get_template
from pem_composition.tasks.tables import read_table

WORDS = ["good", "fine", "great", "nice", "bad", "poor", "awful", "sad"]
SHORT = ("--num_beams", 2, "--max_new_tokens", 6, "--repetition_penalty", 1.2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A tiny Llama, a module for it, instructions and a short template."""
    folder = tmp_path_factory.mktemp("answer")
    base = write_causal(folder / "base", "llama", [" ".join(WORDS)])
    module = random_module(tiny("llama"))
    checkpoint.save(replace(module, base=base_identity(base)), folder / "module")
    rows = [{"instruction": f"{w} fine", "input": "", "output": w} for w in WORDS]
    write_jsonl(folder / "rows.jsonl", rows)
    template = {"with_input": "{instruction} {input} ", "without_input": "{instruction} "}
    (folder / "t.json").write_text(json.dumps(template))
    return folder


def test_the_file_holds_what_the_library_gives_with_and_without_a_module(pem, bench, tmp_path):
    model = ("answer", "--model_name_or_path", bench / "base", "--template", bench / "t.json")
    given = ("--instruction_file", bench / "rows.jsonl", "--max_instructions", 3, *SHORT)
    out = tmp_path / "a" / "out.jsonl"
    done = pem(*model, *given, "--output_file", out)
    assert done.code == 0 and "3 answers" in done.out, done.err
    base, tokenizer, _ = load_causal(bench / "base")
    examples = examples_of(read_table(bench / "rows.jsonl"))[:3]
    template = get_template(str(bench / "t.json"))
    expected = answers(base, tokenizer, examples, template, BeamSearch(2, 1.2, 6))
    assert read_jsonl(out) == [answer._asdict() for answer in expected]
    assert (
        read_jsonl(out)[0]["reference"] == "good"
        and read_jsonl(out)[0]["instruction"] == "good fine"
    )
    changed = tmp_path / "b.jsonl"
    more = ("--adapter", bench / "module", "--batch_size", 2, "--output_file", changed)
    assert pem(*model, *given, *more).code == 0
    assert [r["text"] for r in read_jsonl(changed)] != [r["text"] for r in read_jsonl(out)]
    refused = pem(*model, *given, "--output_file", out)
    assert refused.code == 2 and "the output exists" in refused.err and len(read_jsonl(out)) == 3
    assert pem(*model, *given, "--output_file", out, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"instruction_file": "empty.jsonl"}, "the file is empty"),
        ({"instruction_file": "other.jsonl"}, "no instructions; found text"),
        ({"template": "bad.json"}, "'without_input' lacks {instruction}"),
        ({"template": "chat"}, "the tokenizer has no chat template"),
        ({"max_new_tokens": 66}, "row 0: the answer would not fit in the model's context"),
        ({"num_beams": 0}, "--num_beams: cannot be used"),
        ({"max_instructions": 0}, "--max_instructions"),
        ({"adapter": "nothing"}, "nothing"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "--load_in_4bit: contradicts"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(pem, bench, tmp_path, changes, words):
    (bench / "empty.jsonl").write_text("")
    (bench / "other.jsonl").write_text('{"text": "good"}\n')
    bad = {"with_input": "{instruction} {input}", "without_input": "Do it."}
    (bench / "bad.json").write_text(json.dumps(bad))
    flags = {
        "model_name_or_path": "base",
        "instruction_file": "rows.jsonl",
        "template": "t.json",
        "output_file": tmp_path / "new" / "out.jsonl",
        "max_new_tokens": 5,
    } | changes
    paths = ("model_name_or_path", "instruction_file", "adapter")
    argv = []
    for name, value in flags.items():
        inside = name in paths or str(value).endswith(".json")
        argv += [f"--{name}", bench / str(value) if inside else value]
    done = pem("answer", *argv)
    assert done.code == 2 and words in done.err, done.err
    assert done.err.count("\n") == 1 and not list(tmp_path.rglob("*.jsonl*"))


def test_select_writes_parts_and_a_record(pem, tmp_path):
    rows = [{"text": f"comment with the number {i}", "toxicity": i / 40} for i in range(41)]
    comments = write_jsonl(tmp_path / "c.jsonl", rows)
    test = write_jsonl(
        tmp_path / "t.jsonl", [{"instruction": "x", "output": rows[40]["text"] + "!"}]
    )
    out = tmp_path / "out"
    flags = ("--input_file", comments, "--score_above", 0.5, "--exclude", test, "--instruction",
             "Write.", "Reply.", "--validation_size", 4, "--output_dir", out)  # fmt: skip
    done = pem("select", *flags)
    assert done.code == 0 and "1 overlapping" in done.out and "15 train" in done.out, done.err
    parts = {name: read_jsonl(out / f"{name}.jsonl") for name in ("train", "validation")}
    texts = [row["output"] for part in parts.values() for row in part]
    assert sorted(texts) == sorted(row["text"] for row in rows[21:40])
    record = json.loads((out / "selection.json").read_text())
    assert record["score"] == "toxicity above 0.5" and record["validation"] == 4
    assert list(record["excluded"]) == [str(test)] and len(record["sha256"]) == 64
    again = pem("select", *flags)
    assert again.code == 2 and str(out) in again.err
    assert pem("select", *flags, "--overwrite").code == 0
    for other, words in (
        (("--output_dir", tmp_path / "x"), "--input_file or --task_name"),
        (("--input_file", comments, "--task_name", "civil_comments", "--output_dir", "x"), "which"),
        (("--input_file", comments, "--samples", 0, "--output_dir", "x"), "--samples"),
        (("--input_file", comments, "--samples", 99, "--output_dir", "x"), "too few rows are left"),
    ):
        refused = pem("select", *other)
        assert refused.code == 2 and words in refused.err
