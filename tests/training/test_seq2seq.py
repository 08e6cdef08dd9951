"""Text-to-text training: the loss is T5's own, and a run behaves as one for classification does."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.rounding import exact_difference, of_sum
from support.tiny_models import write_text_to_text
from support.training_bench import (
    a_batch,
    argv_of,
    losses,
    numpy_cross_entropy,
    refusal,
    results,
    write_rows,
)

from pem_composition import checkpoint
from pem_composition.adapters import attach
from pem_composition.cli import main
from pem_composition.errors import CheckpointError, PEMError
from pem_composition.evaluation.models import load_seq2seq
from pem_composition.objectives.losses import cross_entropy
from pem_composition.training import runs
from pem_composition.training.runs import trained_objective

pytestmark = pytest.mark.slow

QUIET = {"lora_dropout": None, "eval_strategy": "no", "eval_steps": None}


def test_prompts_that_are_cut_are_counted_and_the_length_that_fits_is_said(text, capsys):
    start, _, _ = a_batch(text.config("cuts", max_seq_length=8))
    told = capsys.readouterr().out
    objective = trained_objective(text.config("cuts"))
    rows = runs.read_data(text.config("cuts"), objective)
    prompt = objective.prompt_of(rows.task)
    sizes = [len(start.tokenizer(prompt.source(rows.task, e)).input_ids) for e in rows.train]
    assert f"of {len(sizes)} training rows {sum(n > 8 for n in sizes)} lose the end of the" in told
    assert f"--max_seq_length {max(sizes)} keeps all" in told
    a_batch(text.config("cuts", max_seq_length=max(sizes)))
    assert "lose" not in capsys.readouterr().out


@pytest.mark.parametrize("target", ["label", "next_block"])
def test_the_loss_is_that_of_the_model_and_of_float64(text, target):
    config = text.config("loss", "blocks" if target == "next_block" else None)
    start, batch, loss = a_batch(config)
    model, labels = start.model.eval().double(), batch.pop("labels")
    assert (labels == -100).any() == (target == "label")
    counts = labels != -100
    assert torch.equal(batch["decoder_input_ids"][counts], model._shift_right(labels)[counts])
    outputs = model(**batch)
    mine = loss(outputs, labels)
    del batch["decoder_input_ids"]
    theirs = model(**batch, labels=labels).loss
    torch.testing.assert_close(mine.double(), theirs, rtol=of_sum(labels), atol=0)
    assert mine.item() == pytest.approx(
        numpy_cross_entropy(outputs.logits, labels), rel=of_sum(labels)
    )


def test_shares_of_a_batch_add_up_to_its_loss():
    """Targets of different length: the mean is over all tokens, not of the means."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (4, 5), generator=generator)
    labels[0, 1:] = labels[3, 3:] = -100
    count = labels.ne(-100).sum()
    whole = cross_entropy({"logits": logits}, labels)
    parts = [
        cross_entropy({"logits": logits[s]}, labels[s], count) for s in (slice(1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=of_sum(labels), atol=0)
    assert whole.item() == pytest.approx(numpy_cross_entropy(logits, labels), rel=of_sum(labels))


def test_a_model_learns_to_answer(text):
    config = text.config(
        "answers", adapter_config="fft", lora_dropout=None, learning_rate=3e-3, max_steps=120,
        eval_steps=60,
    )  # fmt: skip
    folder = runs.run(config).output_dir
    scores = results(folder)
    before, after = losses(folder)[0], losses(folder)[-1]
    assert after < 0.25 * before
    assert scores["eval_accuracy"] > 0.8
    assert scores["eval_exact_match"] <= scores["eval_accuracy"]
    assert scores["eval_invalid_share"] < 0.2


def test_a_model_learns_the_language_of_documents(text):
    changes = {"adapter_config": "fft", "learning_rate": 5e-3, "max_steps": 80}
    config = text.config("language", "blocks", lora_dropout=None, **changes)
    folder = runs.run(config).output_dir
    evaluated = losses(folder, "eval_loss")
    assert evaluated[-1] < 0.5 * losses(folder)[0]
    assert results(folder)["eval_loss"] == min(evaluated), "the smallest loss is the best"
    assert results(folder)["eval_perplexity"] == pytest.approx(np.exp(min(evaluated)))
    assert results(folder)["train_samples"] == text_blocks(text) - 1


def text_blocks(text):
    tokenizer = load_seq2seq(text.base).tokenizer
    rows = [json.loads(line)["text"] for line in text.documents.read_text().splitlines()]
    return sum(len(tokenizer(row).input_ids) for row in rows) // 8


@pytest.fixture(scope="module")
def lora(text):
    return runs.run(text.config("t5-lora", max_steps=20, eval_steps=10)).output_dir


def test_the_module_opens_in_plain_peft_with_equal_logits_and_scores(text, lora):
    """Independent oracle: PEFT's model, from the files alone, gives the reported accuracy."""
    from peft import PeftModel, PeftModelForSeq2SeqLM

    assert json.loads((lora / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    loaded = load_seq2seq(text.base)
    loaded.model.double()
    theirs = PeftModel.from_pretrained(load_seq2seq(text.base).model, lora).eval().double()
    assert isinstance(theirs, PeftModelForSeq2SeqLM)
    rows = [json.loads(line) for line in text.bench.validation.read_text().splitlines()]
    batch = loaded.tokenizer([r["sentence"] for r in rows], padding=True, return_tensors="pt")
    batch = {n: batch[n] for n in ("input_ids", "attention_mask")}
    answers = [loaded.tokenizer(word).input_ids[:-1] for word in ("sad w1", "good")]
    scores = []
    with torch.no_grad():
        for answer in answers:
            fed = torch.tensor([[0, *answer[:-1]]] * len(rows))
            logits = theirs(**batch, decoder_input_ids=fed).logits
            with attach(loaded.model, checkpoint.load(lora)):
                ours = loaded.model(**batch, decoder_input_ids=fed).logits
            torch.testing.assert_close(ours, logits, rtol=0, atol=1e-9)
            log_p = logits.log_softmax(-1)
            scores.append(sum(log_p[:, place, token] for place, token in enumerate(answer)))
    best = torch.stack(scores, 1).argmax(1)
    labels = torch.tensor([r["label"] for r in rows])
    assert (best == labels).float().mean().item() == pytest.approx(results(lora)["eval_accuracy"])
    nll = -torch.stack(scores, 1)[torch.arange(len(rows)), labels].mean().item()
    assert results(lora)["eval_loss"] == pytest.approx(nll, abs=1e-5)


@pytest.mark.parametrize("target", ["label", "next_block"])
def test_bfloat16_and_grouping_train_and_score(text, target):
    quick = {"lora_dropout": None, "max_steps": 8, "eval_steps": 4}
    own = "blocks" if target == "next_block" else None
    changes = quick | {"bf16": True, "group_by_length": True}
    folder = runs.run(text.config(f"{target}-bf16", own, **changes)).output_dir
    assert np.isfinite(losses(folder)).all()
    stored = load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}


def test_full_fine_tuning_keeps_the_two_embedding_tensors_apart(text):
    """transformers 5 declares every T5 tied; two tensors stay two: in memory, on disk, reloaded."""
    config = text.config(
        "t5-fft", adapter_config="fft", lora_dropout=None, max_steps=4, eval_steps=None
    )
    module = runs.train(config)
    folder = text.folder / "t5-fft"
    stored, base = (
        load_file(folder / "model.safetensors"),
        load_file(text.base / "model.safetensors"),
    )
    assert stored.keys() == base.keys()
    for name in ("lm_head.weight", "shared.weight"):
        assert not torch.equal(stored[name], base[name])
    assert not torch.equal(stored["lm_head.weight"], stored["shared.weight"])
    written = json.loads((folder / "config.json").read_text())
    assert written["tie_word_embeddings"] is False and written["scale_decoder_outputs"] is False
    tuned, original = load_seq2seq(folder).model.double(), load_seq2seq(text.base).model.double()
    assert tuned.lm_head.weight is not tuned.shared.weight
    ids = torch.arange(3, 33).reshape(2, 15)
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    with torch.no_grad():
        before = original(**batch).logits
        with attach(original, exact_difference(module, stored, base)):
            torch.testing.assert_close(original(**batch).logits, tuned(**batch).logits)
        assert torch.equal(original(**batch).logits, before)
        assert not torch.equal(tuned(**batch).logits, before)


def test_a_model_without_its_output_embeddings_is_refused(text, tmp_path):
    shutil.copytree(text.base, tmp_path / "cut")
    weights = load_file(text.base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the input embeddings") as e:
        load_seq2seq(tmp_path / "cut")
    assert "tie_word_embeddings false" in str(e.value)
    config = json.loads((text.base / "config.json").read_text())
    tied = config | {"tie_word_embeddings": True}
    (tmp_path / "cut" / "config.json").write_text(json.dumps(tied))
    model = load_seq2seq(tmp_path / "cut").model
    assert model.lm_head.weight is model.shared.weight


def test_a_model_with_a_weight_missing_is_refused(text, tmp_path):
    shutil.copytree(text.base, tmp_path / "cut")
    weights = load_file(text.base / "model.safetensors")
    gone = "decoder.block.1.layer.1.EncDecAttention.q.weight"
    del weights[gone]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not a complete T5ForConditionalGeneration") as error:
        load_seq2seq(tmp_path / "cut")
    assert gone in str(error.value)


def test_classifier_and_language_model_start_from_one_initial_module(text, capsys):
    folder = text.folder / "t5-init"
    argv = ["init", "--objective", "seq2seq", "--model_name_or_path", str(text.base)]
    assert main([*argv, "--output_dir", str(folder)]) == 0
    initial = checkpoint.load(folder)
    assert initial.provenance.init[:12] in capsys.readouterr().out
    assert not initial.head_tensors()
    assert main([*argv, "--task_name", "rte", "--output_dir", str(folder)]) == 0
    assert "skipped" in capsys.readouterr().out
    still = {
        "init_from": folder,
        "max_steps": 1,
        "learning_rate": 1e-12,
        "weight_decay": 0,
        **QUIET,
    }
    for module in (
        runs.train(text.config("label-from-init", **still)),
        runs.train(text.config("block-from-init", "blocks", **still)),
    ):
        assert module.provenance.init == initial.provenance.init
        for name, tensor in module.tensors.items():
            torch.testing.assert_close(tensor, initial.tensors[name], rtol=0, atol=1e-9)


def test_models_that_cannot_do_the_objective_are_refused(text, capsys, tmp_path):
    flags = text.flags("refused", model_name_or_path=text.bench.base)
    line = refusal(capsys, argv_of(flags))
    assert "--objective seq2seq needs a model that writes; found a bert model" in line
    (tmp_path / "marian").mkdir()
    (tmp_path / "marian" / "config.json").write_text('{"model_type": "marian"}')
    plain = text.bench.flags("refused", model_name_or_path=tmp_path / "marian")
    line = refusal(capsys, argv_of(plain))
    assert "marian models have no classification head" in line and "--objective seq2seq" in line
    assert not (text.folder / "refused").exists()


def test_modules_of_another_kind_or_model_are_no_start(text, capsys, lora):
    other = write_text_to_text(text.folder / "t5-other", text.texts, seed=1)
    flags = text.flags("refused", init_from=lora, model_name_or_path=other, lora_dropout=None)
    assert "does not fit --model_name_or_path" in refusal(capsys, argv_of(flags))
    kind = text.flags("refused", init_from=lora, adapter_config="ia3", lora_dropout=None)
    assert "does not fit --adapter_config" in refusal(capsys, argv_of(kind))
    head = text.bench.folder / "init-with-head"
    argv = ["init", "--model_name_or_path", str(text.bench.base), "--num_labels", "2"]
    assert main([*argv, "--output_dir", str(head)]) == 0
    assert "does not fit --model_name_or_path" in refusal(
        capsys, argv_of(text.flags("refused", init_from=head))
    )
    whole = text.flags("refused", init_from=text.bench.base, adapter_config="fft")
    assert "found bert of width 32, expected t5 of width 32" in refusal(
        capsys, argv_of(whole | {"lora_dropout": 0})
    )
    assert not (text.folder / "refused").exists()


def test_the_key_holds_the_prompt_by_content_and_only_what_the_objective_uses(text, tmp_path):
    def key(config):
        objective = trained_objective(config)
        data = runs.read_data(config, objective)
        return runs.key_of(runs.describe_run(config, data, objective.content(data.task)))

    copy = tmp_path / "elsewhere.json"
    copy.write_text(text.prompt.read_text())
    plain = key(text.config("key"))
    assert key(text.config("key", prompt=copy)) == plain
    assert key(text.config("key", target="label")) == plain
    copy.write_text(text.prompt.read_text().replace("good", "great"))
    assert key(text.config("key", prompt=copy)) != plain
    blocks = key(text.config("key", "blocks"))
    assert blocks != key(text.config("key", "blocks", block_size=9))
    assert blocks == key(text.config("key", "blocks", max_seq_length=64))
    fields = text.bench.config("key").result_fields()
    assert not {"objective", "target", "prompt", "block_size"} & fields.keys()


def test_a_best_metric_that_the_objective_does_not_give_is_refused(text):
    with pytest.raises(PEMError, match=r"f1.*accuracy, exact_match, loss"):
        runs.run(text.config("refused", metric_for_best_model="f1"))
    with pytest.raises(PEMError, match=r"accuracy.*loss, perplexity"):
        runs.run(text.config("refused", "blocks", metric_for_best_model="accuracy"))


def test_too_little_text_for_two_blocks_is_refused(text, tmp_path):
    short = write_rows(tmp_path / "short.jsonl", 1, seed=1)
    with pytest.raises(PEMError, match="fewer than two blocks"):
        runs.run(
            text.config("refused", "blocks", train_file=short, validation_file=None, block_size=64)
        )
