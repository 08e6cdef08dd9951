"""Tuning on instructions: the loss, runs, and modules that start from a trained one."""

from __future__ import annotations

import json

import pytest
import torch
from support.objective_benches import ObjectiveBench
from support.rounding import of_sum
from support.tiny_models import write_causal
from support.training_bench import (
    BAD,
    GOOD,
    a_batch,
    argv_of,
    losses,
    numpy_cross_entropy,
    refusal,
    results,
)

from pem_composition import checkpoint
from pem_composition.cli import main
from pem_composition.module import combine, detoxify
from pem_composition.record import purposes
from pem_composition.training import runs

pytestmark = pytest.mark.slow

QUIET = {"eval_strategy": "no", "eval_steps": None}
KINDS = ("lora", "ia3")


class InstructionBench(ObjectiveBench):
    """Tiny decoders, and rows that ask for the word after each word."""

    def __init__(self, bench) -> None:
        super().__init__(bench)
        words = (*GOOD, *BAD)
        texts = [" ".join(words), "### Instruction: Input: Response: Carry out the instruction."]
        self.bases = {n: write_causal(self.folder / f"i-{n}", n, texts) for n in ("gpt2", "llama")}
        template = {"with_input": "{instruction} {input} = ", "without_input": "{instruction} = "}
        self.template = self.folder / "template.json"
        self.template.write_text(json.dumps(template | {"stop": ["="]}))
        self.rows = {}
        for name, step in (("good", 1), ("toxic", 3)):
            self.rows[name] = self.folder / f"i-{name}.jsonl"
            with self.rows[name].open("w") as file:
                for i in range(48):
                    asked = [words[(i + j) % 8] for j in range(1 + i % 3)]
                    row = {"instruction": asked[0], "input": " ".join(asked[1:])}
                    row["output"] = " ".join([words[(i + j + step) % 8] for j in range(1 + i % 3)])
                    file.write(json.dumps(row) + "\n")

    def own(self, name=None):
        return {
            "objective": "instruction",
            "model_name_or_path": self.bases[name or "llama"],
            "task_name": None,
            "train_file": self.rows["good"],
            "validation_file": self.rows["good"],
            "template": self.template,
            "max_seq_length": 60,
            "lora_dropout": None,
        }


@pytest.fixture(scope="module")
def asked(bench):
    return InstructionBench(bench)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("inputs", [False, True])
def test_the_loss_is_that_of_the_model_on_the_answers_or_the_whole_text(asked, name, inputs):
    start, batch, loss = a_batch(asked.config("loss", name, train_on_inputs=inputs))
    model, labels = start.model.eval().double(), batch.pop("labels")
    outputs = model(**batch)
    real = batch["attention_mask"] == 1
    counted = labels != -100
    assert torch.equal(counted, counted & real) and (torch.equal(counted, real) == inputs)
    assert torch.equal(labels[:, :-1][real[:, 1:] & counted[:, :-1]],
                       batch["input_ids"][:, 1:][real[:, 1:] & counted[:, :-1]])  # fmt: skip
    mine = loss(outputs, labels)
    assert mine.item() == pytest.approx(
        numpy_cross_entropy(outputs.logits, labels), rel=of_sum(labels)
    )
    shifted = torch.cat([torch.full((len(labels), 1), -100), labels], dim=1)
    ids = torch.cat([batch["input_ids"], torch.zeros(len(labels), 1, dtype=torch.long)], dim=1)
    for row, end in enumerate(real.sum(dim=1).tolist()):
        ids[row, end] = labels[row, end - 1]
    torch.testing.assert_close(
        mine, model(input_ids=ids, labels=shifted).loss, rtol=of_sum(labels), atol=0
    )


def test_a_batch_of_prompts_that_fill_their_length_has_no_loss(asked):
    _, batch, loss = a_batch(asked.config("empty"))
    labels = torch.full_like(batch.pop("labels"), -100)
    logits = torch.randn(*labels.shape, 96)
    assert loss({"logits": logits}, labels).item() == 0
    assert loss({"logits": logits}, labels, torch.tensor(0)).item() == 0


@pytest.mark.parametrize("inputs", [False, True])
def test_rows_that_the_cut_leaves_no_answer_are_left_out_and_named(asked, capsys, inputs):
    """By hand: tokens of prompt and answer, row by row."""
    start, _, _ = a_batch(asked.config("cuts", train_on_inputs=inputs, max_seq_length=60))
    assert "--max_seq_length" not in capsys.readouterr().out, "every row fits"
    rows = [json.loads(line) for line in asked.rows["good"].read_text().splitlines()]
    sizes = []
    for row in rows:
        prompt = (
            f"{row['instruction']} {row['input']} = "
            if row["input"]
            else (f"{row['instruction']} = ")
        )
        tokens = start.tokenizer(prompt + row["output"]).input_ids
        shared = start.tokenizer(prompt).input_ids
        common = next(
            (i for i, (a, b) in enumerate(zip(shared, tokens, strict=False)) if a != b),
            min(len(shared), len(tokens)),
        )
        sizes.append((common, len(tokens) + 1))
    length = sorted(before for before, _ in sizes)[-10]
    none = [i for i, (before, _) in enumerate(sizes) if before >= length]
    part = [i for i, (before, n) in enumerate(sizes) if before < length < n]
    assert none and part and len(none) + len(part) < 48
    config = asked.config(
        "cuts", train_on_inputs=inputs, max_seq_length=length, per_device_train_batch_size=64
    )
    _, batch, _ = a_batch(config)
    told = capsys.readouterr().out
    assert len(batch["input_ids"]) == 48 - len(none)
    assert ((batch["labels"] != -100).sum(dim=1) > 0).all()
    named = ", ".join(map(str, none[:5]))
    assert f"--max_seq_length {length}: of 48 training rows {len(none)} keep no token" in told
    assert f"{len(part)} lose the end of the answer" in told and f"(rows {named}" in told
    longest = max(n for _, n in sizes)
    assert f"--max_seq_length {longest} keeps all" in told
    a_batch(asked.config("cuts", train_on_inputs=inputs, max_seq_length=longest))
    assert "keep" not in capsys.readouterr().out, "what is proposed holds"


@pytest.mark.parametrize("objective", ["instruction", "causal_lm"])
def test_the_logged_loss_is_the_mean_over_the_target_tokens(asked, tmp_path, objective):
    """The Trainer would leave out one token per row: it takes labels for ones yet to be shifted."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": w}) + "\n" for w in ("good", "bad fine", "sad")))
    files = {"train_file": texts, "validation_file": texts, "template": None}
    own = files if objective == "causal_lm" else {}
    changes = {
        "objective": objective,
        "train_on_inputs": objective == "instruction",
        **own,
        **QUIET,
    }
    config = asked.config(f"logged-{objective}", max_steps=1, logging_steps=1, **changes)
    start, batch, loss = a_batch(config)
    labels = batch.pop("labels")
    expected = loss(start.model(**batch), labels).item()
    runs.train(config)
    assert losses(asked.folder / f"logged-{objective}")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_to_answer_and_is_skipped_when_it_is_done(asked, kind, capsys):
    rate = {"lora": 2e-2, "ia3": 2e-1}[kind]
    config = asked.config(f"run-{kind}", adapter_config=kind, learning_rate=rate, max_steps=60)
    module = runs.train(config)
    history = losses(asked.folder / f"run-{kind}", "eval_loss")
    assert history[-1] < 0.95 * history[0]
    folder = asked.folder / f"run-{kind}"
    assert results(folder)["eval_perplexity"] < 96
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    content = module.provenance.training["content"]
    assert content["template"] == ["{instruction} {input} = ", "{instruction} = "]
    assert (
        main(
            argv_of(
                asked.flags(f"run-{kind}", adapter_config=kind, learning_rate=rate, max_steps=60)
            )
        )
        == 0
    )
    assert "already holds the result" in capsys.readouterr().out


def test_the_template_is_in_the_key_by_what_it_says(asked, tmp_path):
    from pem_composition.training.identity import describe_run
    from pem_composition.training.runs import trained_objective

    copy = tmp_path / "copy.json"
    copy.write_text(asked.template.read_text())
    found = []
    for template in (asked.template, copy, "sections", None, "chat"):
        config = asked.config("key", template=template)
        objective = trained_objective(config)
        data = runs.read_data(config, objective)
        found.append(describe_run(config, data, objective.content(data.task)))
    assert found[0] == found[1] != found[2] == found[3] != found[4]
    answers = [e.label for e in data.train]
    assert len(set(answers)) > 1, "answers are part of the rows' digest"


# --- a module trained from another one ----------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def family(request, asked):
    """An initial module, one trained from it, and one trained from that one on other rows."""
    kind = request.param
    init = asked.folder / f"f-init-{kind}"
    argv = ["init", "--objective", "instruction", "--model_name_or_path", asked.bases["llama"],
            "--adapter_config", kind, "--output_dir", init]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    shape = {"adapter_config": kind, "max_steps": 12, "learning_rate": 1e-2, **QUIET}
    runs.train(asked.config(f"f-own-{kind}", init_from=init, **shape))
    toxic = {"train_file": asked.rows["toxic"], "init_from": asked.folder / f"f-own-{kind}"}
    purpose = "it exists to be subtracted"
    runs.train(asked.config(f"f-toxic-{kind}", **shape, **toxic, purpose=purpose))
    names = ("init", "own", "toxic")
    return kind, {n: asked.folder / f"f-{n}-{kind}" for n in names}


def test_the_run_starts_from_the_numbers_of_the_trained_module(asked, family):
    kind, folders = family
    start = runs.train(
        asked.config(
            f"f-still-{kind}", adapter_config=kind, init_from=folders["own"], max_steps=1,
            learning_rate=1e-12, warmup_ratio=0, weight_decay=0, **QUIET,
        )
    )  # fmt: skip
    own = checkpoint.load(folders["own"])
    for name, tensor in own.tensors.items():
        torch.testing.assert_close(start.tensors[name], tensor, rtol=0, atol=1e-9)
    assert any(not t.eq(0).all() for n, t in own.tensors.items() if n.endswith(("_B", "ia3")))


def test_the_record_names_the_module_it_was_trained_from(family):
    _, folders = family
    record = json.loads((folders["toxic"] / "pem.json").read_text())
    (source,) = record["sources"]
    own = json.loads((folders["own"] / "pem.json").read_text())
    assert source["sha256"] == own["files"]["adapter_model.safetensors"]
    assert source["path"] == str(folders["own"]) and source["init"] == own["init"]
    told = f"{folders['toxic'].name} was trained from {folders['own'].name} ({source['sha256']})"
    assert told in record["notes"]
    assert any("it exists to be subtracted" in note for note in record["notes"])
    assert "it exists to be subtracted" in (folders["toxic"] / "README.md").read_text()
    assert own["sources"] == [] and own["notes"] == [], "an initial module is no parent"


def test_merging_knows_that_the_two_began_alike(family):
    kind, folders = family
    init, own, toxic = (checkpoint.load(folders[n]) for n in ("init", "own", "toxic"))
    assert own.provenance.init == init.provenance.init != toxic.provenance.init
    forms = ("exact", "reference") if kind == "lora" else ("exact",)
    for merged in [
        combine([own, toxic], [1.0, -0.5]),
        *(detoxify(own, toxic, 0.5, form=f) for f in forms),
    ]:
        notes = " ".join(merged.provenance.notes)
        assert "different initialisations" not in notes
        assert "was trained from" in notes and "it exists to be subtracted" in notes
        assert merged.provenance.init == own.provenance.init


def test_what_a_module_is_for_is_inherited_by_what_is_trained_from_it(asked, family):
    kind, folders = family
    shape = {"adapter_config": kind, "max_steps": 1, **QUIET}
    child = runs.train(asked.config(f"f-child-{kind}", init_from=folders["toxic"], **shape))
    stated = purposes(child.provenance.notes)
    assert "it exists to be subtracted" in stated[child.name], child.provenance.notes


# --- refusals -----------------------------------------------------------------------------------


def test_rows_and_templates_that_cannot_be_used_are_refused(asked, capsys, tmp_path):
    def file(name, content):
        path = tmp_path / name
        path.write_text(content)
        return path

    no_output = file("a.jsonl", json.dumps({"instruction": "good"}) + "\n")
    bad = {"with_input": "{instruction} {input}", "without_input": "Do it."}
    template = file("t.json", json.dumps(bad))
    for changes, words in (
        ({"train_file": file("e.jsonl", "")}, ("the file is empty",)),
        ({"train_file": no_output}, ("no answers", "expected columns instruction, input")),
        ({"template": template}, ("'without_input' lacks {instruction}",)),
        ({"template": "chat"}, ("no chat template", "--template sections")),
        ({"max_seq_length": 2}, ("--max_seq_length", "leaves no token of any answer")),
    ):
        line = refusal(capsys, argv_of(asked.flags("refused", **changes)))
        assert all(word in line for word in words), line
    assert not (asked.folder / "refused").exists()


def test_the_new_flags_are_in_no_key_of_another_objective(asked):
    fields = asked.config("key").result_fields()
    assert fields["train_on_inputs"] is False and "template" not in fields
    loading = {"load_in_8bit", "load_in_4bit", "model_dtype", "device_map"}
    assert not loading & fields.keys(), "at their defaults they change no number"
    assert asked.config("key", load_in_4bit=True).result_fields()["load_in_4bit"] is True
    for other in ({}, {"objective": "seq2seq"}, {"objective": "causal_lm"}):
        keys = asked.bench.config("key", **other).result_fields().keys()
        assert not (loading | {"train_on_inputs", "template"}) & keys
