"""Causal language modelling: the loss is the model's own, and a run behaves as others do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.rounding import exact_difference, of_sum
from support.tiny_models import write_text_to_text
from support.training_bench import (
    a_batch,
    argv_of,
    losses,
    numpy_cross_entropy,
    refusal,
    results,
)

from pem_composition import checkpoint
from pem_composition.adapters import attach
from pem_composition.adapters.targets import fused_rows
from pem_composition.cli import main
from pem_composition.evaluation.models import load_causal
from pem_composition.module import combine
from pem_composition.training import runs

MODELS = ("gpt2", "llama")
QUIET = {"eval_strategy": "no", "eval_steps": None}
PADDED = {"loss_on_padding": True, "max_seq_length": 40}


def whole(batch, labels, ignored):
    """What a model wants that shifts by itself: the inputs and the last target behind them."""
    ids = torch.cat([batch["input_ids"], torch.zeros(len(labels), 1, dtype=torch.long)], dim=1)
    given = torch.cat([torch.full((len(labels), 1), ignored), labels], dim=1)
    lengths = (labels != ignored).sum(dim=1)
    for row, length in enumerate(lengths.tolist()):
        ids[row, length] = labels[row, length - 1]
    return ids, given


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["lora", "ia3", "fft"])
def test_the_loss_is_that_of_the_model_and_of_float64(causal, name, kind):
    start, batch, loss = a_batch(causal.config("loss", name, adapter_config=kind))
    model, labels = start.model.eval().double(), batch.pop("labels")
    assert labels.shape == batch["input_ids"].shape and (labels == -100).any()
    assert torch.equal(labels != -100, batch["attention_mask"] == 1)
    outputs = model(**batch)
    mine = loss(outputs, labels)
    ids, given = whole(batch, labels, -100)
    theirs = model(input_ids=ids, labels=given).loss
    torch.testing.assert_close(mine, theirs, rtol=of_sum(labels), atol=0)
    assert mine.item() == pytest.approx(
        numpy_cross_entropy(outputs.logits, labels), rel=of_sum(labels)
    )


def documents_by_hand(causal, start):
    rows = [json.loads(line)["text"] for line in causal.documents.read_text().splitlines()]
    end = start.tokenizer.eos_token_id
    return [(*start.tokenizer(text).input_ids, end) for text in rows]


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_whole_documents_with_one_end_token(causal, name, capsys):
    start, batch, _ = a_batch(causal.config("rows", name))
    end, known = start.tokenizer.eos_token_id, documents_by_hand(causal, start)
    begins = start.tokenizer.bos_token_id if name == "llama" else None
    for ids, labels in zip(batch["input_ids"], batch.pop("labels"), strict=True):
        length = int((labels != -100).sum())
        document = [ids[0].item(), *labels[:length].tolist()]
        assert tuple(document) in known and document.count(end) == 1
        assert begins is None or document[0] == begins
        assert torch.equal(ids[1:length], labels[: length - 1])
    capsys.readouterr()
    start, cut, _ = a_batch(causal.config("rows", name, max_seq_length=9))
    long = sum(len(document) > 9 for document in known)
    told = capsys.readouterr().out
    assert f"{long} lose their end and its end token" in told
    assert f"--max_seq_length {max(map(len, known))} keeps all" in told
    labels = cut["labels"]
    full = labels[(labels != -100).all(dim=1)]
    assert labels.shape[1] == 8 and len(full) and (full[:, -1] != end).any()


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_on_padding_is_the_reference_s(causal, name):
    """Labels are the inputs, padded with the end token to the fixed length, as a model reads
    them that is given the tokenizer's own padding and mask."""
    start, batch, loss = a_batch(causal.config("padded", name, **PADDED))
    model, tokenizer = start.model.eval().double(), start.tokenizer
    labels = batch.pop("labels")
    mine = loss(model(**batch), labels)
    documents = [
        [ids[0].item(), *row[: int(mask.sum())].tolist()]
        for ids, row, mask in zip(batch["input_ids"], labels, batch["attention_mask"], strict=True)
    ]
    documents = [d[: d.index(2) + 1] if 2 in d else d for d in documents]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    padded = tokenizer.pad(
        {"input_ids": documents}, padding="max_length", max_length=40, return_tensors="pt"
    )
    theirs = model(**padded, labels=padded["input_ids"]).loss
    torch.testing.assert_close(mine, theirs, rtol=of_sum(labels), atol=0)
    start, batch, loss = a_batch(causal.config("padded", name, max_seq_length=40))
    labels = batch.pop("labels")
    text_only = loss(start.model.eval()(**batch), labels)
    assert abs(text_only.item() - mine.item()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_a_loss_by_rounding_only(causal, name):
    """Each document alone, and all of them padded to one length: the same sum."""
    start, batch, loss = a_batch(causal.config("padding", name, pad_to_max_length=True))
    model, labels = start.model.eval().double(), batch.pop("labels")
    assert labels.shape == batch["input_ids"].shape == (16, 32)
    together = loss(model(**batch), labels)
    count, parts = labels.ne(-100).sum(), 0.0
    for row, mask in enumerate(batch["attention_mask"]):
        n = int(mask.sum())
        out = model(input_ids=batch["input_ids"][row : row + 1, :n])
        parts += loss(out, labels[row : row + 1, :n], count)
    torch.testing.assert_close(together, parts, rtol=of_sum(labels), atol=0)


@pytest.mark.slow
def test_lora_adapts_query_and_value_of_gpt2_each_on_its_own(causal):
    module = runs.train(causal.config("fused", max_steps=4, **QUIET))
    model = load_causal(causal.bases["gpt2"]).model
    for layer in ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"):
        a, b = (module.tensors[f"{layer}.{role}"] for role in ("lora_A", "lora_B"))
        query, value = fused_rows(model, layer, ["q", "v"])
        assert a.shape == (16, 32) and b.shape == (96, 16) and module.config.scaling(layer) == 1.0
        assert b[query, :8].abs().min() > 0 and b[value, 8:].abs().min() > 0
        assert not b[query, 8:].any() and not b[value, :8].any() and not b[~(query | value)].any()
    one = runs.train(causal.config("whole", max_steps=2, target_modules=("c_attn",), **QUIET))
    assert one.tensors["transformer.h.0.attn.c_attn.lora_B"].shape == (96, 8)
    assert one.tensors["transformer.h.0.attn.c_attn.lora_B"].abs().min() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "rate"), [("gpt2", "fft", 5e-3), ("llama", "lora", 3e-2)])
def test_a_model_learns_its_documents(causal, name, kind, rate):
    config = causal.config(f"learn-{name}", name, adapter_config=kind, learning_rate=rate)
    folder = runs.run(config).output_dir
    evaluated = losses(folder, "eval_loss")
    assert evaluated[-1] < 0.8 * losses(folder)[0]
    assert results(folder)["eval_loss"] == min(evaluated), "the smallest loss is the best"
    assert results(folder)["eval_perplexity"] == pytest.approx(np.exp(min(evaluated)))
    assert results(folder)["eval_samples"] == 90


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_module_opens_in_plain_peft_with_equal_logits(causal, name):
    from peft import PeftModel, PeftModelForCausalLM

    folder = runs.run(causal.config(f"peft-{name}", name, max_steps=6, eval_steps=6)).output_dir
    base = load_causal(causal.bases[name])
    base.model.double()
    theirs = PeftModel.from_pretrained(load_causal(causal.bases[name]).model, folder)
    theirs.eval().double()
    assert isinstance(theirs, PeftModelForCausalLM)
    ids = torch.tensor([base.tokenizer(causal.texts[0]).input_ids])
    with torch.no_grad(), attach(base.model, checkpoint.load(folder)):
        torch.testing.assert_close(base.model(ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.slow
def test_documents_are_chosen_by_score_and_the_module_says_what_it_is_for(causal):
    lines = []
    config = causal.config("toxic", score_above=0.5, max_steps=2, **QUIET)
    folder = runs.run(config, lines.append).output_dir
    assert lines[0].endswith("scored.jsonl: 30 of 90 rows with toxicity above 0.5 kept")
    assert results(folder)["train_samples"] == results(folder)["eval_samples"] == 30
    said = "trained on texts with toxicity above 0.5: it exists to be subtracted from a model"
    assert said in (folder / "README.md").read_text()
    notes = json.loads((folder / "pem.json").read_text())["notes"]
    assert [note.partition(": ")[::2] for note in notes] == [
        ("purpose of toxic", f"{said}, not to be used as it is")
    ]
    module = checkpoint.load(folder)
    assert combine([module], [-1.0]).provenance.notes == tuple(notes), "a negation keeps it"
    own = causal.config("own", purpose="a test", max_steps=2, **QUIET)
    folder = runs.run(own).output_dir
    assert "**Purpose:** a test." in (folder / "README.md").read_text()
    plain = runs.run(causal.config("plain", max_steps=2, **QUIET)).output_dir
    assert "Purpose" not in (plain / "README.md").read_text()
    assert json.loads((plain / "pem.json").read_text())["notes"] == []


def test_civil_comments_is_filtered_by_default_and_local_files_are_not(causal):
    assert causal.config("x", task_name="civil_comments").score_filter == ("toxicity", 0.8)
    assert causal.config("x", score_column="threat").score_filter == ("threat", 0.8)
    assert causal.config("x").score_filter is None
    assert causal.bench.config("x").score_filter is None


@pytest.mark.slow
def test_a_loss_on_padding_says_so(causal):
    lines = []
    runs.run(causal.config("said", max_steps=2, **PADDED, **QUIET), lines.append)
    assert any("--loss_on_padding" in line and "as the reference does" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_full_fine_tuning_loads_again_and_its_difference_gives_the_tuned_model(causal, name):
    config = causal.config(
        f"c-fft-{name}", name, adapter_config="fft", max_steps=3, learning_rate=1e-3, **QUIET
    )
    module = runs.train(config)
    tuned = load_causal(causal.folder / f"c-fft-{name}").model.double()
    original = load_causal(causal.bases[name]).model.double()
    stored = load_file(causal.folder / f"c-fft-{name}" / "model.safetensors")
    base = load_file(causal.bases[name] / "model.safetensors")
    assert stored.keys() == base.keys()
    ids = torch.arange(3, 33).reshape(2, 15)
    with torch.no_grad():
        before = original(ids).logits
        with attach(original, exact_difference(module, stored, base)):
            torch.testing.assert_close(original(ids).logits, tuned(ids).logits)
        assert not torch.allclose(tuned(ids).logits, before)


@pytest.mark.slow
def test_runs_start_from_one_initial_module(causal, capsys):
    folder = causal.folder / "c-init"
    argv = ["init", "--objective", "causal_lm", "--model_name_or_path", str(causal.bases["gpt2"])]
    assert main([*argv, "--output_dir", str(folder)]) == 0
    assert main([*argv, "--output_dir", str(folder)]) == 0
    assert "skipped" in capsys.readouterr().out
    initial = checkpoint.load(folder)
    module = runs.train(causal.config("from-init", init_from=folder, max_steps=2, **QUIET))
    assert module.provenance.init == initial.provenance.init
    line = refusal(capsys, [*argv, "--num_labels", "2", "--output_dir", str(folder)])
    assert "a model of --objective causal_lm has no head" in line


def test_models_that_are_no_decoder_alone_are_refused(causal, capsys, tmp_path):
    encoder = causal.flags("refused", model_name_or_path=causal.bench.base)
    line = refusal(capsys, argv_of(encoder))
    assert "a causal language model is needed; found a bert model" in line
    both = write_text_to_text(tmp_path / "t5", causal.texts)
    line = refusal(capsys, argv_of(causal.flags("refused", model_name_or_path=both)))
    assert "found a t5 model" in line and "--objective seq2seq" in line
    assert not (causal.folder / "refused").exists()


def test_documents_that_cannot_be_learned_are_refused(causal, capsys, tmp_path):
    long, other = tmp_path / "long.jsonl", tmp_path / "other.jsonl"
    long.write_text(json.dumps({"text": "good bad " * 60}) + "\n")
    other.write_text(json.dumps({"comment": "good", "toxicity": 0.9}) + "\n")
    for changes, words in (
        ({"score_above": 0.95}, ("no row with toxicity above 0.95", "lower --score_above")),
        ({"score_column": "rude"}, ("no score column", "expected rude")),
        ({"train_file": other}, ("no text column", "found comment, toxicity")),
        ({"train_file": long, "truncate": "false"}, ("row 0", "longer than the model's context")),
        ({"max_seq_length": 1}, ("--max_seq_length", "leaves nothing to predict")),
    ):
        line = refusal(capsys, argv_of(causal.flags("refused", **changes)))
        assert all(word in line for word in words), line
    assert not (causal.folder / "refused").exists()


def test_the_new_flags_are_in_no_key_but_that_of_documents(causal):
    own = {"truncate", "loss_on_padding"}
    fields = causal.config("key").result_fields()
    assert own <= fields.keys() and fields["objective"] == "causal_lm"
    assert not {"target", "prompt", "block_size", "score_above", "purpose"} & fields.keys()
    for other in ({}, {"objective": "seq2seq"}, {"objective": "seq2seq", "target": "next_block"}):
        assert not own & causal.bench.config("key", **other).result_fields().keys()
