"""Modules on a base that bitsandbytes holds in 8 or 4 bits: attached and trained, never folded."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from support import tiny_models as tiny
from support.judges import write_judge
from support.training_bench import argv_of, losses

from pem_composition import checkpoint, cli
from pem_composition.adapters import attach, extract, fold
from pem_composition.errors import IncompatibleModules
from pem_composition.evaluation.load_options import LoadOptions
from pem_composition.evaluation.models import load_causal

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs = pytest.mark.skipif(not INSTALLED, reason="needs bitsandbytes, the extra [quantized]")
WORDS = "good fine great nice bad poor awful sad"
SHAPE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}  # whole blocks of 64


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama wide enough to be quantised, and rows of instructions for it."""
    folder = tmp_path_factory.mktemp("quantised")
    tiny.BUILDERS["llama-wide"] = tiny._causal("Llama", **SHAPE)
    try:
        tiny.write_causal(folder / "base", "llama-wide", [WORDS])
    finally:
        del tiny.BUILDERS["llama-wide"]
    rows = [{"instruction": f"{w} fine", "output": f"{w} {w}"} for w in WORDS.split() * 2]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = {"with_input": "{instruction} {input} ", "without_input": "{instruction} "}
    (folder / "t.json").write_text(json.dumps(template))
    return folder


@pytest.fixture(params=[8, 4])
def quantised(request, base):
    """The model as bitsandbytes holds it, in float32 elsewhere."""
    return load_causal(base / "base", load_options=LoadOptions(request.param)).model.eval()


IDS = torch.arange(3, 33).reshape(2, 15)


@needs
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_module_adds_to_a_quantised_layer_what_it_adds_to_any(quantised, kind):
    layer = quantised.model.layers[0].self_attn.v_proj
    assert not layer.weight.is_floating_point()
    module = tiny.random_module(quantised, kind)
    x = torch.randn(3, 128)
    with torch.no_grad():
        plain, before = quantised(IDS).logits, layer(x).numpy()
        with attach(quantised, module):
            changed = quantised.model.layers[0].self_attn.v_proj(x).numpy()
            assert not torch.equal(quantised(IDS).logits, plain)
        torch.testing.assert_close(quantised(IDS).logits, plain, rtol=0, atol=0)
    name = "model.layers.0.self_attn.v_proj"
    if kind == "lora":
        A, B = (module.tensors[f"{name}.{role}"].numpy() for role in ("lora_A", "lora_B"))
        expected = before + 1.5 * x.numpy() @ A.T @ B.T
    else:
        expected = before * module.tensors[f"{name}.ia3"].numpy()
    np.testing.assert_allclose(changed, expected, rtol=1e-4, atol=1e-4)


@needs
def test_folding_into_quantised_weights_is_refused_by_name(quantised):
    before = quantised.model.layers[0].self_attn.v_proj.weight.clone()
    words = r"layer model.layers.0.self_attn.q_proj: is quantised, and a module cannot be folded.*"
    for permanent in (False, True):
        with pytest.raises(IncompatibleModules, match=words + "attach the module instead"):
            fold(quantised, tiny.random_module(quantised), permanent=permanent)
    assert torch.equal(quantised.model.layers[0].self_attn.v_proj.weight, before)


def flags(base, output, **changes):
    return {
        "model_name_or_path": base / "base",
        "objective": "instruction",
        "train_file": base / "rows.jsonl",
        "validation_file": base / "rows.jsonl",
        "template": base / "t.json",
        "output_dir": base / output,
        "max_steps": 6,
        "eval_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
    } | changes


@needs
@pytest.mark.parametrize("how", ["load_in_8bit", "load_in_4bit"])
def test_a_module_is_trained_on_a_quantised_base(base, how):
    """With evaluations between the steps and activations computed again."""
    changes = {how: "true", "gradient_checkpointing": "true"}
    assert cli.main(argv_of(flags(base, how, **changes))) == 0
    history = losses(base / how)
    assert history[-1] < history[0]
    first, second = losses(base / how, "eval_loss")
    assert second < first - 0.1, "the first evaluation has not ended the training"
    module = checkpoint.load(base / how)
    assert all(t.dtype == torch.float32 for t in module.tensors.values())
    assert any(t.abs().max() > 1e-3 for n, t in module.tensors.items() if n.endswith("lora_B"))
    assert module.base.fingerprint == checkpoint.base_identity(base / "base").fingerprint
    assert module.provenance.training["flags"][how] is True


@needs
def test_the_programs_that_write_take_a_quantised_base(base, capsys):
    """Answers of a quantised base with modules attached; the table attaches what it would fold."""
    for name, seed in (("own", 1), ("toxic", 2)):
        model = load_causal(base / "base").model
        with attach(model, tiny.random_module(model, seed=seed)):
            checkpoint.save(extract(model), base / name)
    asked = ["--model_name_or_path", base / "base", "--instruction_file", base / "rows.jsonl",
             "--template", base / "t.json", "--num_beams", 2, "--max_new_tokens", 4,
             "--max_instructions", 3, "--load_in_4bit", "--use_cpu"]  # fmt: skip
    answer = ["answer", *asked, "--adapter", base / "own", "--output_file", base / "a.jsonl"]
    table = ["detoxify", "--evaluate", *asked, "-a", base / "own", base / "toxic",
             "--strength", 0.5, "--judge", write_judge(base, "bad", "good"),
             "-p", base / "table"]  # fmt: skip
    for argv in (answer, table):
        assert cli.main([str(word) for word in argv]) == 0, capsys.readouterr().err
    line = json.loads((base / "table" / "results.jsonl").read_text().splitlines()[0])
    assert line["weights"] == "4 bits" and len(line["answer"]) == 3
    own = base / "table" / "answers" / "instruction-module" / "rows.jsonl"
    answers = [json.loads(text)["answer"] for text in own.read_text().splitlines()]
    assert answers == [json.loads(x)["answer"] for x in (base / "a.jsonl").read_text().splitlines()]


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
def test_without_bitsandbytes_one_line_says_what_to_install(base, capsys):
    for how in ("load_in_8bit", "load_in_4bit"):
        assert cli.main(argv_of(flags(base, "refused", **{how: "true"}))) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"--{how}: the package bitsandbytes is not installed; " in error
        assert "-m pip install 'bitsandbytes>=0.48'" in error
    assert not (base / "refused").exists()
