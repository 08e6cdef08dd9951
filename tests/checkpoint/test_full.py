"""Full models: differences to the base, sums tensor by tensor, shards, heads, tied weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers import RobertaModel as Roberta

from pem_composition.checkpoint import (
    combine_full,
    fold_checkpoint,
    full,
    inspect_header,
    load,
    save,
)
from pem_composition.errors import CheckpointError, IncompatibleModules, PEMError
from pem_composition.module import combine

SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base RoBERTa without prefix or head, and two classifiers tuned from it."""
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, num_labels=3, id2label={0: "no", 1: "maybe", 2: "yes"})
    base = Roberta(config, add_pooling_layer=False)
    base.save_pretrained(tmp_path / "base")
    folders = {"base": tmp_path / "base"}
    for name in ("a", "b"):
        model = RobertaForSequenceClassification(config)
        model.roberta.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text('{"of": "' + name + '"}')
        folders[name] = tmp_path / name
    return folders


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_model_minus_its_base_and_back(models: dict[str, Path], tmp_path: Path) -> None:
    module = load(models["a"], base=models["base"])
    theta, theta_0 = weights(models["a"]), weights(models["base"])
    assert module.kind == "full"
    for name, tensor in theta.items():
        if name.startswith("classifier"):
            assert torch.equal(module.tensors[f"{name}.head"], tensor)
        else:
            expected = tensor - theta_0[name.removeprefix("roberta.")]
            assert torch.equal(module.tensors[f"{name}.delta"], expected)
    assert module.head is not None
    assert module.head.labels == ("no", "maybe", "yes")
    header = inspect_header(models["a"])
    assert {n: i.shape for n, i in header.infos.items()} == {
        n: t.shape for n, t in module.tensors.items()
    }
    module.save(tmp_path / "back")
    written = weights(tmp_path / "back")
    assert written.keys() == theta.keys()
    for name, tensor in theta.items():
        torch.testing.assert_close(written[name], tensor, atol=1e-7, rtol=1e-6)
    again = RobertaForSequenceClassification.from_pretrained(tmp_path / "back")
    assert again.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    ids = torch.tensor([[0, 5, 6, 2]])
    original = RobertaForSequenceClassification.from_pretrained(models["a"])
    found, expected = (m.eval().double()(ids).logits for m in (again, original))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # the rounding of weights


@pytest.mark.parametrize("coefficients", [[0.3, 0.7], [1.0, -0.4], [0.5, 0.2]])
def test_the_streamed_sum_against_float64(
    models: dict[str, Path], tmp_path: Path, coefficients: list[float]
) -> None:
    pair = [models["a"], models["b"]]
    combine_full(pair, coefficients, tmp_path / "sum", base=models["base"])
    found, theta_0 = weights(tmp_path / "sum"), weights(models["base"])
    a, b = weights(models["a"]), weights(models["b"])
    shares = [abs(c) / sum(map(abs, coefficients)) for c in coefficients]
    for name, tensor in found.items():
        x, y = a[name].double(), b[name].double()
        if name.startswith("classifier"):
            expected = shares[0] * x + shares[1] * y
        else:
            zero = theta_0[name.removeprefix("roberta.")].double()
            expected = zero + coefficients[0] * (x - zero) + coefficients[1] * (y - zero)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=0)
    parts = [load(m, base=models["base"]) for m in pair]
    module = combine(parts, coefficients)
    save(module, tmp_path / "module", base=models["base"])
    for name, tensor in weights(tmp_path / "module").items():
        torch.testing.assert_close(tensor, found[name], atol=1e-6, rtol=0)
    record = json.loads((tmp_path / "sum" / "pem.json").read_text())
    assert [t["coefficient"] for t in record["terms"]] == coefficients
    assert (tmp_path / "sum" / "tokenizer.json").read_text() == '{"of": "a"}'
    assert RobertaForSequenceClassification.from_pretrained(tmp_path / "sum").config.num_labels == 3


@pytest.mark.parametrize(("c", "dtype"), [(1e39, None), (1e39, "float16"), (1e7, "float16")])
def test_a_sum_beyond_its_dtype_is_refused_by_name(
    models: dict[str, Path], tmp_path: Path, c: float, dtype: str | None
) -> None:
    with pytest.raises(PEMError, match=r"LayerNorm\.bias.*(too large for float32|overflows in)"):
        combine_full(
            [models["a"], models["b"]], [c, 1.0], tmp_path / "out", base=models["base"], dtype=dtype
        )
    assert not (tmp_path / "out").exists()


def test_one_model_with_coefficient_one_is_itself(models: dict[str, Path], tmp_path: Path) -> None:
    combine_full([models["a"]], [1.0], tmp_path / "same")
    theta = weights(models["a"])
    assert all(torch.equal(t, theta[n]) for n, t in weights(tmp_path / "same").items())


def test_head_policies(models: dict[str, Path], tmp_path: Path) -> None:
    pair, key = [models["a"], models["b"]], "classifier.out_proj.weight"
    a, b = (weights(m)[key] for m in pair)
    for policy, expected in (("first", a), ("last", b), ("average", 0.25 * a + 0.75 * b)):
        combine_full(pair, [0.25, 0.75], tmp_path / policy, head=policy)
        torch.testing.assert_close(weights(tmp_path / policy)[key], expected)
    combine_full(pair, [0.25, 0.75], tmp_path / "none", head="none")
    assert not any(n.startswith("classifier") for n in weights(tmp_path / "none"))
    remedy = r"the heads differ.*--head average.*a module, unlike a checkpoint, can keep all"
    with pytest.raises(IncompatibleModules, match=remedy):
        combine_full(pair, [0.25, 0.75], tmp_path / "error", head="error")
    assert not (tmp_path / "error").exists()


@pytest.mark.parametrize("c", [0.2, 0.5])  # a sum of 1 needs no other tensor of the base
def test_no_head_of_the_models_leaves_the_base_s(
    c: float, models: dict[str, Path], tmp_path: Path
) -> None:
    """A sum around a base that has a head keeps it, with its labels, as a fold does."""
    pair, base = [models["a"], models["b"]], models["a"]
    options: dict[str, Any] = {"head": "none"}
    combine_full(pair, [0.5, c], tmp_path / "sum", base=base, **options)
    named = dict(zip("xy", pair, strict=True))
    options["allow_base_mismatch"] = True
    fold_checkpoint(f"0.5*x + {c}*y", named, base, tmp_path / "fold", **options)
    found, folded, own = (weights(f) for f in (tmp_path / "sum", tmp_path / "fold", base))
    assert found.keys() == folded.keys() == own.keys()
    assert all(torch.equal(t, folded[n]) for n, t in found.items())
    assert all(torch.equal(t, own[n]) for n, t in found.items() if n.startswith("classifier"))
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("sum", "fold")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_written_has_the_dtype_of_what_was_read(
    models: dict[str, Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    for name in ("base", "a", "b"):
        kind: Any = Roberta if name == "base" else RobertaForSequenceClassification
        options = {"add_pooling_layer": False} if name == "base" else {}
        model = kind.from_pretrained(models[name], dtype=dtype, **options)
        model.save_pretrained(tmp_path / name)
    pair, base = [tmp_path / "a", tmp_path / "b"], tmp_path / "base"
    combine_full(pair, [0.5, 0.5], tmp_path / "sum")
    combine_full(pair, [0.5, 0.5], tmp_path / "ties", base=base, method="ties")
    fold_checkpoint("0.5*x + 0.5*y", dict(zip("xy", pair, strict=True)), base, tmp_path / "fold")
    save(combine([load(m, base=base) for m in pair], [0.5, 0.5]), tmp_path / "module", base=base)
    for out in ("sum", "ties", "fold", "module"):
        assert {t.dtype for t in weights(tmp_path / out).values()} == {dtype}, out


def test_shards_are_read_and_written(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        model = RobertaForSequenceClassification.from_pretrained(models[name])
        model.save_pretrained(tmp_path / f"{name}-sharded", max_shard_size="2KB")
        assert not (tmp_path / f"{name}-sharded" / "model.safetensors").exists()
    combine_full([models["a"], models["b"]], [0.5, 0.5], tmp_path / "single")
    monkeypatch.setattr("pem_composition.checkpoint.model_folder.MAX_SHARD_BYTES", 2000)
    combine_full([tmp_path / "a-sharded", tmp_path / "b-sharded"], [0.5, 0.5], tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    found: dict[str, Tensor] = {}
    for shard in shards:
        found |= load_file(shard)
    expected = weights(tmp_path / "single")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    loaded = RobertaForSequenceClassification.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in expected.items())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_tied_weights_stay_tied_and_stored_once(tmp_path: Path, form: str) -> None:
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11, n_positions=8)
        )
        folder = tmp_path / str(seed)
        model.save_pretrained(folder)
        if form == "bin":
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        folders.append(folder)
    combine_full(folders, [0.5, 0.5], tmp_path / "sum")
    found = weights(tmp_path / "sum")
    assert "lm_head.weight" not in found
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "sum")
    assert model.lm_head.weight is model.transformer.wte.weight
    parts = (
        [GPT2LMHeadModel.from_pretrained(f).lm_head.weight for f in folders]
        if form != "bin"
        else None
    )
    if parts:
        torch.testing.assert_close(model.lm_head.weight, 0.5 * parts[0] + 0.5 * parts[1])


def rewrite(folder: Path, **changes: Any) -> None:
    tensors = weights(folder)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def test_what_is_written_in_float64_is_computed_in_float64(
    models: dict[str, Path], tmp_path: Path
) -> None:
    pair, options = [models["a"], models["b"]], {"dtype": "float64", "head": "average"}
    combine_full(pair, [0.3, 0.7], tmp_path / "sum", **options)
    named = dict(zip("ab", pair, strict=True))
    fold_checkpoint("0.3*a + 0.7*b", named, models["base"], tmp_path / "fold", **options)
    a, b = (weights(p) for p in pair)
    for out in ("sum", "fold"):
        for name, tensor in weights(tmp_path / out).items():
            exact = 0.3 * a[name].double() + 0.7 * b[name].double()
            torch.testing.assert_close(tensor, exact, rtol=1e-14, atol=1e-16)


def test_integer_buffers_must_be_equal_and_are_copied(
    models: dict[str, Path], tmp_path: Path
) -> None:
    pair = [models["a"], models["b"]]
    for folder in pair:
        rewrite(folder, steps=torch.arange(4))
    combine_full(pair, [0.5, 0.5], tmp_path / "same", dtype="float16")
    assert torch.equal(weights(tmp_path / "same")["steps"], torch.arange(4))
    assert weights(tmp_path / "same")["classifier.dense.bias"].dtype == torch.float16
    assert json.loads((tmp_path / "same" / "config.json").read_text())["dtype"] == "float16"
    rewrite(models["b"], steps=torch.arange(4) + 1)
    with pytest.raises(IncompatibleModules, match="'steps'"):
        combine_full(pair, [0.5, 0.5], tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("holder", ["base", "a"])
def test_an_integer_buffer_that_only_one_side_stored_is_no_difference(
    models: dict[str, Path], holder: str
) -> None:
    """Models saved by old releases of transformers hold position_ids, new ones do not."""
    plain = load(models["a"], base=models["base"])
    prefix = "roberta." if holder == "a" else ""
    rewrite(models[holder], **{f"{prefix}embeddings__position_ids": torch.arange(4)})
    module = load(models["a"], base=models["base"])
    assert module.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(module.tensors[n], plain.tensors[n]) for n in plain.tensors)


def test_requests_that_cannot_be_met(models: dict[str, Path], tmp_path: Path) -> None:
    pair, out = [models["a"], models["b"]], tmp_path / "out"
    for coefficients, options, words in (
        ([1.0, -0.4], {}, "found sum 0.6, expected sum 1"),
        ([0.5], {}, "1 coefficients for 2 models"),
        ([float("nan"), 1.0], {}, "finite"),
        ([0.5, 0.5], {"head": "best"}, "found 'best'"),
        ([0.5, 0.5], {"dtype": "int8"}, "found 'int8'"),
        ([1.0, 1.0], {"base": tmp_path / "absent"}, "no base model"),
    ):
        with pytest.raises(PEMError, match=words):
            combine_full(pair, coefficients, out, **options)  # type: ignore[arg-type]
        assert not out.exists()


NAME = "roberta.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "is in one model only"),
        (torch.ones(3, 8), r"found F32 \(3, 8\), expected F32 \(8, 8\)"),
        (torch.full((8, 8), float("nan")), "not finite"),
        (torch.ones(8, 8).int(), "found I32"),
    ],
)
def test_models_that_do_not_fit(
    models: dict[str, Path], tmp_path: Path, value: Tensor | None, words: str
) -> None:
    rewrite(models["b"], **{NAME.replace(".", "__"): value})
    with pytest.raises(PEMError, match=words) as error:
        combine_full([models["a"], models["b"]], [0.5, 0.5], tmp_path / "out")
    assert NAME in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_full_model_needs_its_base(models: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no base model") as error:
        load(models["a"])
    assert "base=" in str(error.value)
    rewrite(models["base"], encoder__layer__0__attention__self__query__weight=torch.ones(3, 8))
    with pytest.raises(IncompatibleModules, match=r"found F32 \(8, 8\), expected F32 \(3, 8\)"):
        load(models["a"], base=models["base"])
    rewrite(models["a"], **{NAME.replace(".", "__"): None})
    with pytest.raises(IncompatibleModules, match="missing tensor"):
        load(models["a"], base=models["base"])


def test_another_base_than_the_recorded_one_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    module = load(models["a"], base=models["base"])
    rewrite(models["base"], embeddings__word_embeddings__weight=torch.ones(20, 8))
    with pytest.raises(IncompatibleModules, match="not the base this module belongs to"):
        module.save(tmp_path / "out")


def test_head_names() -> None:
    assert full.is_head("classifier.dense.weight")
    assert full.is_head("heads.task.1.weight")
    assert not full.is_head("lm_head.weight")
    assert not full.is_head("roberta.encoder.layer.0.attention.self.query.weight")
