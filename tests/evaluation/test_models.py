"""Base models: complete, in float32 and with the task's labels, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import inputs_for, logits_of, tiny, write_causal, write_text_to_text
from tokenizers import Tokenizer, models
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, T5ForConditionalGeneration
from transformers.activations import NewGELUActivation

from pem_composition import network, offline
from pem_composition.errors import CheckpointError, PEMError
from pem_composition.evaluation import models as evaluated
from pem_composition.evaluation.model_names import max_input_length, resolve
from pem_composition.evaluation.models import load_base, load_causal, load_seq2seq
from pem_composition.evaluation.own_classes import of_model
from pem_composition.tasks.glue import TASKS

TEXTS = ["a good film", "a bad film, and long"]


def save_tokenizer(folder: Path) -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "a": 2}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(folder)


@pytest.fixture
def base(tmp_path) -> Path:
    """A RoBERTa encoder without a head, stored in bfloat16."""
    tiny("roberta").roberta.bfloat16().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(tmp_path) -> Path:
    """A whole MNLI model with its head."""
    model = tiny("roberta")
    model.config.id2label = TASKS["mnli"].id2label
    model.config.label2id = {w: i for i, w in TASKS["mnli"].id2label.items()}
    model.save_pretrained(tmp_path / "tuned")
    save_tokenizer(tmp_path / "tuned")
    return tmp_path / "tuned"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(path: object, task: str = "rte", **options: object) -> str:
    with pytest.raises(PEMError) as error:
        load_base(path, TASKS[task], **options)
    message = str(error.value)
    assert "\n" not in message
    assert error.value.exit_code == 2
    return message


def test_a_base_is_loaded_in_float32_with_a_new_head_that_is_named(base):
    model, tokenizer, info = load_base(base, TASKS["rte"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    assert model.config.problem_type == "single_label_classification"
    assert info["missing_keys"]
    assert all(k.startswith("classifier.") for k in info["missing_keys"])
    stored = load_file(base / "model.safetensors")
    weights = model.roberta.state_dict()
    assert all(torch.equal(weights[n], t.float()) for n, t in stored.items() if n in weights)
    assert tokenizer.pad_token_id == 1
    assert not model.training


def test_the_dtype_and_the_dropout_are_as_asked(base):
    model = load_base(base, num_labels=5, dtype=torch.bfloat16, hidden_dropout_prob=0.25).model
    assert model.dtype == torch.bfloat16
    assert model.config.hidden_dropout_prob == 0.25
    assert model.classifier.out_proj.out_features == 5
    assert "roberta models have no such setting" in refused(base, hidden_dropuot=0.1)


@pytest.mark.parametrize("name", ["t5-gated", "gpt2"])
def test_a_fused_gelu_is_the_same_function(tmp_path, name):
    if name == "gpt2":
        folder, load, own = write_causal(tmp_path / "m", name, TEXTS), load_causal, GPT2LMHeadModel
    else:
        folder = write_text_to_text(tmp_path / "m", TEXTS)
        load, own = load_seq2seq, T5ForConditionalGeneration
    ours = load(folder, dtype=torch.float64).model.eval()
    reference = own.from_pretrained(folder, dtype=torch.float64).eval()
    if name == "t5-gated":  # transformers 5 ties what the file keeps apart
        reference.lm_head.weight = ours.lm_head.weight
    eager = [m for m in reference.modules() if isinstance(m, NewGELUActivation)]
    assert eager and not any(isinstance(m, NewGELUActivation) for m in ours.modules())
    batch = inputs_for(reference)
    expected = logits_of(reference, batch)
    torch.testing.assert_close(logits_of(ours, batch), expected, rtol=1e-9, atol=1e-9)


def test_regression_has_one_output(base):
    model = load_base(base, TASKS["stsb"]).model
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_a_whole_model_keeps_its_head(tuned):
    model, _, info = load_base(tuned, TASKS["mnli"])
    assert info["missing_keys"] == []
    stored = load_file(tuned / "model.safetensors")
    assert torch.equal(model.classifier.dense.weight, stored["classifier.dense.weight"])


def test_a_head_of_another_size_is_refused(tuned):
    message = refused(tuned, "rte")
    assert "'classifier.out_proj.bias' has another shape" in message
    assert "found (3,), expected (2,)" in message
    assert "found (3,), expected (1,)" in refused(tuned, "stsb")


def test_a_head_with_its_classes_in_another_order_is_refused(tuned):
    words = ("contradiction", "neutral", "entailment")
    edit_config(
        tuned,
        id2label={str(i): w for i, w in enumerate(words)},
        label2id={w: i for i, w in enumerate(words)},
    )
    message = refused(tuned, "mnli")
    assert "found contradiction, neutral, entailment" in message
    assert "expected entailment, neutral, contradiction" in message


@pytest.mark.parametrize("numbered", [None, {str(i): f"LABEL_{i}" for i in range(3)}])
def test_classes_that_label2id_alone_names_have_their_order(tuned, numbered):
    """transformers would call them LABEL_0, ...: any order would be taken for the task's."""
    words = ("contradiction", "neutral", "entailment")
    edit_config(tuned, id2label=numbered, label2id={w: i for i, w in reversed([*enumerate(words)])})
    assert "found contradiction, neutral, entailment" in refused(tuned, "mnli")
    assert of_model(str(tuned)) == words
    edit_config(tuned, label2id=dict.fromkeys(words, 0))  # which says nothing
    assert of_model(str(tuned)) == ("LABEL_0", "LABEL_1", "LABEL_2")[: 3 if numbered else 2]


def test_weights_missing_outside_the_head_are_refused(tuned):
    stored = load_file(tuned / "model.safetensors")
    gone = "roberta.encoder.layer.1.output.dense.weight"
    save_file({n: t for n, t in stored.items() if n != gone}, tuned / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    message = refused(tuned, "mnli")
    assert "not a complete RobertaForSequenceClassification" in message
    assert gone in message


def test_another_architecture_is_refused(tuned):
    edit_config(tuned, model_type="bert", architectures=["BertForSequenceClassification"])
    assert "not a complete BertForSequenceClassification" in refused(tuned, "mnli")


def test_damaged_and_missing_files_are_refused(tuned):
    weights = tuned / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot be loaded" in refused(tuned, "mnli")
    weights.unlink()
    assert "no weights in the directory" in refused(tuned, "mnli")
    (tuned / "config.json").unlink()
    assert "not a model directory; found no config.json" in refused(tuned, "mnli")


def test_a_pickle_is_refused_where_the_restriction_is_off(tuned, monkeypatch):
    stored = load_file(tuned / "model.safetensors")
    (tuned / "model.safetensors").unlink()
    torch.save(stored, tuned / "pytorch_model.bin")
    assert load_base(tuned, TASKS["mnli"]).loading_info["missing_keys"] == []
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert "could run code while TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set" in refused(tuned, "mnli")


def test_a_malicious_pickle_does_not_run(tuned, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tuned / "model.safetensors").unlink()
    torch.save({"roberta.x": Attack()}, tuned / "pytorch_model.bin")
    assert "cannot be loaded" in refused(tuned, "mnli")
    assert not (tmp_path / "ran").exists()


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_name(tmp_path):
    message = refused(tmp_path / "nowhere")
    assert "found no such directory" in message
    assert "minilm" in message
    assert "found no such directory" in refused("./runs/rte")
    (tmp_path / "file").touch()
    assert "found a file" in refused(tmp_path / "file")


def test_without_a_hub_the_error_comes_at_once_and_names_what_works(monkeypatch, tmp_path):
    monkeypatch.setattr(network, "reachable", lambda: False)
    message = refused("no-such-organisation/no-such-model")
    assert "neither in the cache nor from the hub" in message
    assert "one of minilm" in message


def test_offline_names_resolve_to_their_folder(monkeypatch, base):
    monkeypatch.setattr(offline, "get", lambda name: base)
    assert resolve("offline:minilm") == resolve("minilm") == str(base)


def test_the_longest_input_leaves_out_robertas_padding_positions(base, tuned):
    model, tokenizer, _ = load_base(base, TASKS["rte"])
    assert max_input_length(model.config, tokenizer) == 66 - 2
    assert max_input_length(tiny("bert").config, tokenizer) == 66
    longest = torch.full((1, 64), 7)
    assert torch.isfinite(model(longest).logits).all()
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 65), 7))


def test_errors_are_of_the_checkpoint_family(tmp_path):
    with pytest.raises(CheckpointError):
        load_base(tmp_path / "nowhere")


def test_a_padding_token_without_a_row_gives_way_to_the_end_token(tmp_path):
    folder = write_causal(tmp_path / "m", "llama", TEXTS)
    rows = load_causal(folder).model.get_input_embeddings().num_embeddings
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(rows - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= rows
    tokenizer.save_pretrained(folder)
    loaded = load_causal(folder)
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id < rows
    batch = loaded.tokenizer(["a", "a good film"], padding=True, return_tensors="pt")
    assert loaded.model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gpt2", "t5", "qwen2"])
def test_a_model_without_its_tokenizer_is_refused(tmp_path, name):
    tiny(name).save_pretrained(tmp_path)
    load = evaluated.load_seq2seq if name == "t5" else evaluated.load_causal
    with pytest.raises(CheckpointError, match="without its tokenizer; found no vocabulary"):
        load(tmp_path)


def test_a_classifier_without_its_tokenizer_is_refused(tmp_path):
    tiny("roberta").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="without its tokenizer; found no vocabulary"):
        evaluated.load_base(tmp_path, num_labels=3)


def test_a_tokenizer_larger_than_the_embeddings_is_refused_and_padded_embeddings_are_fine(tmp_path):
    write_causal(tmp_path, "gpt2", ["some words of a text", "and of another one"])
    model = evaluated.load_causal(tmp_path).model
    tokens = max(evaluated.load_tokenizer(tmp_path).get_vocab().values()) + 1
    model.resize_token_embeddings(tokens + 63)
    model.save_pretrained(tmp_path)
    evaluated.load_causal(tmp_path)
    model.resize_token_embeddings(tokens - 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"found token {tokens - 1}, expected below"):
        evaluated.load_causal(tmp_path)
