"""The reference layout: every golden module there and back bit for bit, and what it cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.rounding import assert_within_rounding
from torch import Tensor

from pem_composition.checkpoint import inspect_header, load
from pem_composition.config import BaseIdentity, IA3Config, LoraConfig
from pem_composition.errors import CheckpointError, PEMError, UnsupportedModule
from pem_composition.module import PEM, HeadInfo, combine

TRAINED = [
    f"{f}_{k}_{i}/task{i}"
    for f in ("roberta", "t5", "gpt2")
    for k in ("lora", "ia3")
    for i in (1, 2, 3)
]
COMPOSED = [
    *(f"merged_{f}_{k}/a_b" for f in ("roberta", "gpt2") for k in ("lora", "ia3")),
    *(f"negated_{f}_{k}/task1" for f in ("roberta", "gpt2") for k in ("lora", "ia3")),
    *(f"analogy_t5_{k}/a_b_c" for k in ("lora", "ia3")),
]
BINS = ("pytorch_adapter.bin", "pytorch_model_head.bin")
JSONS = ("adapter_config.json", "head_config.json")
H = 4  # width of q, k and v in modules made here


def state(folder: Path, name: str) -> dict[str, Tensor]:
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("name", [*TRAINED, *COMPOSED])
def test_there_and_back_through_peft_returns_equal_files(
    shared: Path, tmp_path: Path, name: str
) -> None:
    golden = shared / "golden" / "adapter_transformers" / name
    load(golden).save(tmp_path / "peft")
    back = tmp_path / "back" / golden.name
    load(tmp_path / "peft").save(back, format="adapter-transformers")
    for file in BINS:
        expected, found = state(golden, file), state(back, file)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
    for file in JSONS:
        assert json.loads((back / file).read_text()) == json.loads((golden / file).read_text())
    header = inspect_header(golden)
    module = load(golden)
    assert {n: i.shape for n, i in header.infos.items()} == {
        n: t.shape for n, t in module.tensors.items()
    }
    assert (
        header.kind == module.kind == name.split("/")[0].split("_")[-1 if name in COMPOSED else 1]
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if "_1/" in n else pytest.mark.slow) for n in TRAINED],
)
def test_the_conversion_gives_the_recorded_logits_in_plain_peft(
    shared: Path, tmp_path: Path, name: str
) -> None:
    import transformers
    from peft import PeftModel

    golden = shared / "golden" / "adapter_transformers"
    family, folder = name.split("_")[0], name.split("/")[0]
    load(golden / name).save(tmp_path / "out")
    base = golden / f"base_{family}"
    kind = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    logits = load_file(golden / "logits.safetensors")
    ids = logits["input_ids"]
    decoder = {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
    with torch.no_grad():
        found = model(input_ids=ids, **decoder).logits
        exact = model.double()(input_ids=ids, **decoder).logits
    assert_within_rounding(logits[f"{folder}.logits"], found, exact)


def test_parameter_space_commutes_with_the_conversion(shared: Path) -> None:
    """merge.py's own output equals the sum of the converted modules."""
    golden = shared / "golden" / "adapter_transformers"
    for family in ("roberta", "gpt2"):
        for kind in ("lora", "ia3"):
            parts = [load(golden / f"{family}_{kind}_{i}" / f"task{i}") for i in (1, 2)]
            ours = combine(parts, [0.3, 0.7])
            theirs = load(golden / f"merged_{family}_{kind}" / "a_b")
            assert ours.tensors.keys() == theirs.tensors.keys()
            for n, tensor in theirs.tensors.items():
                torch.testing.assert_close(ours.tensors[n], tensor, atol=1e-6, rtol=0)


# --- modules made here --------------------------------------------------------------------------


def fused(r: int = 2, layers: int = 2, order: list[int] | None = None) -> PEM:
    """A GPT-2 LoRA on q and v in canonical form, columns permuted by ``order``."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(layers):
        a, b = torch.randn(2 * r, H, generator=generator), torch.zeros(3 * H, 2 * r)
        b[:H, :r] = torch.randn(H, r, generator=generator)
        b[2 * H :, r:] = torch.randn(H, r, generator=generator)
        if order:
            a, b = a[order], b[:, order]
        layer = f"transformer.h.{i}.attn.c_attn"
        tensors |= {f"{layer}.lora_A": a, f"{layer}.lora_B": b}
    config = LoraConfig(2 * r, 6.0, ("c_attn",), fan_in_fan_out=True)
    return PEM(tensors, config, BaseIdentity(model_type="gpt2", hidden_size=H))


def update(pem: PEM, layer: str) -> Tensor:
    assert isinstance(pem.config, LoraConfig)
    a, b = pem.tensors[f"{layer}.lora_A"].double(), pem.tensors[f"{layer}.lora_B"].double()
    return pem.config.scaling(layer) * b @ a


def test_fused_columns_in_any_order_are_sorted_back(tmp_path: Path) -> None:
    natural, mixed = fused(), fused(order=[2, 0, 3, 1])
    for i, module in enumerate((natural, mixed)):
        module.save(tmp_path / str(i) / "x", format="adapter-transformers")
        settings = json.loads((tmp_path / str(i) / "x" / "adapter_config.json").read_text())[
            "config"
        ]
        assert (settings["r"], settings["alpha"], settings["attn_matrices"]) == (2, 3, ["q", "v"])
    a, b = (state(tmp_path / str(i) / "x", BINS[0]) for i in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert a["transformer.h.0.attn.c_attn.loras.x.lora_A"].shape == (4, H)
    assert a["transformer.h.0.attn.c_attn.loras.x.lora_B"].shape == (2 * H, 2)


def test_an_exact_sum_of_fused_modules_is_written_exactly(tmp_path: Path) -> None:
    total = combine([fused(2), fused(3, order=[5, 0, 1, 4, 2, 3])], [1.0, -0.4], space="delta")
    total.save(tmp_path / "sum", format="adapter-transformers")
    again = load(tmp_path / "sum")
    for layer in total.layers:
        torch.testing.assert_close(update(again, layer), update(total, layer), atol=1e-12, rtol=0)


def test_a_fresh_fused_module_keeps_its_a(tmp_path: Path) -> None:
    module = fused()
    zero = {n: t * (0 if n.endswith("lora_B") else 1) for n, t in module.tensors.items()}
    fresh = PEM(zero, module.config, module.base)
    fresh.save(tmp_path / "fresh", format="adapter-transformers")
    again = load(tmp_path / "fresh")
    assert all(torch.equal(again.tensors[n], t) for n, t in zero.items())


def test_an_update_that_mixes_q_and_v_is_refused(tmp_path: Path) -> None:
    module = fused()
    tensors = dict(module.tensors)
    tensors["transformer.h.1.attn.c_attn.lora_B"] = torch.ones(3 * H, 4)
    cannot(PEM(tensors, module.config, module.base), tmp_path, "mixes q, k and v", "h.1.attn")


def cannot(module: PEM, tmp_path: Path, *words: str) -> None:
    with pytest.raises(UnsupportedModule) as error:
        module.save(tmp_path / "out", format="adapter-transformers")
    for word in (*words, "found", "expected", "--format peft"):
        assert word in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists()


def roberta(tensors: dict[str, Tensor], config: Any, head: HeadInfo | None = None) -> PEM:
    return PEM(tensors, config, BaseIdentity(model_type="roberta", hidden_size=H), head=head)


def vectors(*layers: str) -> dict[str, Tensor]:
    return {f"roberta.encoder.layer.{i}.{n}.ia3": torch.rand(H) for i in range(2) for n in layers}


def factors(*layers: str, r: int = 2) -> dict[str, Tensor]:
    out = {}
    for i in range(2):
        for n in layers:
            out[f"roberta.encoder.layer.{i}.{n}.lora_A"] = torch.rand(r, H)
            out[f"roberta.encoder.layer.{i}.{n}.lora_B"] = torch.rand(H, r)
    return out


KEY_VALUE = ("attention.self.key", "attention.self.value")


def test_what_the_layout_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    inputs = IA3Config(("key", "value", "output.dense"), ("output.dense",))
    cannot(roberta(vectors(*KEY_VALUE, "output.dense"), inputs), tmp_path, "on the input of")
    elsewhere = LoraConfig(2, 2, ("attention.output.dense",))
    cannot(
        roberta(factors("attention.output.dense"), elsewhere), tmp_path, "attention.output.dense"
    )
    uneven = factors("attention.self.query")
    uneven |= {n: t for n, t in factors(*KEY_VALUE).items() if "layer.0" in n or ".value." in n}
    with pytest.raises(PEMError, match="adapted layers"):
        roberta(uneven, LoraConfig(2, 2, ("query", "key", "value"))).save(
            tmp_path / "out", format="adapter-transformers"
        )
    ranks = {**factors("attention.self.query"), **factors("attention.self.value", r=3)}
    config = LoraConfig(
        2, 2, ("query", "value"), rank_pattern={"value": 3}, alpha_pattern={"value": 3}
    )
    cannot(roberta(ranks, config), tmp_path, "ranks [2, 3]")
    alphas = LoraConfig(2, 2, ("query", "value"), alpha_pattern={"value": 5})
    cannot(
        roberta(factors("attention.self.query", "attention.self.value"), alphas),
        tmp_path,
        "scalings",
    )
    llama = PEM(vectors("x"), IA3Config(("x",)), BaseIdentity(model_type="llama"))
    cannot(llama, tmp_path, "llama")


def test_a_fused_vector_that_scales_q_keeps_q(tmp_path: Path) -> None:
    layer = "transformer.h.0.attn.c_attn.ia3"
    module = PEM(
        {layer: torch.rand(3 * H) + 2}, IA3Config(("c_attn",)), BaseIdentity(model_type="gpt2")
    )
    module.save(tmp_path / "m", format="adapter-transformers")
    assert torch.equal(load(tmp_path / "m").tensors[layer], module.tensors[layer])
    settings = json.loads((tmp_path / "m" / "adapter_config.json").read_text())["config"]
    assert settings["attn_matrices"] == ["q", "k", "v"]


def test_rslora_becomes_an_alpha_with_the_same_scaling(tmp_path: Path) -> None:
    config = LoraConfig(3, 8, ("query", "value"), use_rslora=True)
    module = roberta(factors("attention.self.query", "attention.self.value", r=3), config)
    module.save(tmp_path / "m", format="adapter-transformers")
    again = load(tmp_path / "m").config
    assert isinstance(again, LoraConfig)
    assert again.scaling("x.query") == config.scaling("x.query")


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_classification_head_computes_what_the_libraries_head_computes(
    tmp_path: Path, kind: str
) -> None:
    """Oracle: Linear, tanh, Linear on the first token, written out with the file's tensors."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    sizes = {
        "hidden_size": H,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
    }
    torch.manual_seed(0)
    if kind == "roberta":
        model: Any = RobertaForSequenceClassification(
            RobertaConfig(vocab_size=20, num_labels=3, **sizes)
        )
        names = [f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")]
    else:
        model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes))
        names = [
            f"{m}.{p}" for m in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")
        ]
    model.eval()
    tensors = factors("attention.self.query", "attention.self.value")
    tensors = {n.replace("roberta", kind): t for n, t in tensors.items()}
    tensors |= {f"{n}.head": model.get_parameter(n).detach().clone() for n in names}
    head = HeadInfo(("no", "maybe", "yes"), "classification")
    module = PEM(
        tensors,
        LoraConfig(2, 2, ("query", "value")),
        BaseIdentity(model_type=kind, hidden_size=H),
        head=head,
    )
    module.save(tmp_path / "m", format="adapter-transformers")
    file = {n: t.double() for n, t in state(tmp_path / "m", BINS[1]).items()}
    ids = torch.tensor([[0, 5, 6, 2]])
    model.double()
    with torch.no_grad():
        features = model.base_model(ids).last_hidden_state[:, 0]
        hidden = torch.tanh(features @ file["heads.m.1.weight"].T + file["heads.m.1.bias"])
        expected = hidden @ file["heads.m.4.weight"].T + file["heads.m.4.bias"]
        torch.testing.assert_close(model(ids).logits, expected, atol=0, rtol=1e-9)
    described = json.loads((tmp_path / "m" / "head_config.json").read_text())["config"]
    assert described["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    again = load(tmp_path / "m")
    assert again.head is not None
    assert again.head.labels == head.labels
    assert all(torch.equal(again.tensors[n], t) for n, t in tensors.items())


# --- files that are refused ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = factors("attention.self.query", "attention.self.value")
    for n in ("dense", "out_proj"):
        tensors[f"classifier.{n}.weight.head"] = torch.rand(H, H)
        tensors[f"classifier.{n}.bias.head"] = torch.rand(H)
    module = roberta(
        tensors, LoraConfig(2, 2, ("query", "value")), HeadInfo(problem="classification")
    )
    module.save(tmp_path / "m.1", format="adapter-transformers")
    (tmp_path / "m.1" / "pem.json").unlink()
    return tmp_path / "m.1"


def refused(folder: Path, *words: str) -> None:
    for read in (inspect_header, load):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        for word in (str(folder), *words):
            assert word in str(error.value), str(error.value)


def edit(folder: Path, file: str = JSONS[0], **changes: Any) -> None:
    config = json.loads((folder / file).read_text())
    config["config"] |= changes
    (folder / file).write_text(json.dumps(config))


def test_a_dot_in_the_folder_name_does_not_enter_the_tensor_names(folder: Path) -> None:
    assert "roberta.encoder.layer.0.attention.self.query.loras.m_1.lora_A" in state(folder, BINS[0])
    assert load(folder).name == "m.1"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_gating": True}, "use_gating"),
        ({"architecture": "houlsby"}, "architecture"),
        ({"composition_mode": "mul"}, "composition_mode"),
        ({"r": 0}, "config.r"),
        ({"r": 3}, "rank 3"),
        ({"alpha": "8"}, "config.alpha"),
        ({"alpha": 0}, "config.alpha"),
        ({"scaling": 2}, "config.scaling"),
        ({"attn_matrices": ["q", "x"]}, "attn_matrices"),
        ({"composition_mode": "scale"}, "r 2, alpha 2"),
    ],
)
def test_wrong_settings_are_refused(folder: Path, change: dict[str, Any], word: str) -> None:
    edit(folder, **change)
    refused(folder, word, "found", "expected")


def test_tensors_that_do_not_fit_are_refused(folder: Path) -> None:
    path = folder / BINS[0]
    good = state(folder, BINS[0])
    layer = "roberta.encoder.layer.0.attention.self.query.loras.m_1"
    for change, words in (
        ({f"{layer}.gate.weight": torch.ones(1, H)}, ("gates",)),
        ({"roberta.pooler.dense.weight": torch.ones(1)}, ("extra tensor",)),
        ({layer.replace("m_1", "b") + ".lora_A": torch.ones(2, H)}, ("two modules",)),
        ({f"{layer}.lora_A": torch.ones(2, H).int()}, ("I32",)),
    ):
        torch.save({**good, **change}, path)
        refused(folder, *words)
    torch.save({k: v for k, v in good.items() if k != f"{layer}.lora_A"}, path)
    refused(folder, "missing tensor", "lora_B only")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"activation_function": "relu"}, "relu"),
        ({"use_pooler": True}, "use_pooler True"),
        ({"head_type": "multiple_choice"}, "multiple_choice"),
    ],
)
def test_a_head_without_an_exact_counterpart_is_refused(
    folder: Path, change: dict[str, Any], word: str
) -> None:
    edit(folder, JSONS[1], **change)
    refused(folder, word, "remove the head files")
    (folder / BINS[1]).unlink()
    assert load(folder).head is None


def test_a_head_made_without_dropout_has_other_positions(folder: Path, tmp_path: Path) -> None:
    renamed = {
        k.replace(".1.", ".0.").replace(".4.", ".2."): t for k, t in state(folder, BINS[1]).items()
    }
    torch.save({k.replace("m_0", "m_1"): t for k, t in renamed.items()}, folder / BINS[1])
    module = load(folder)
    assert module.head_tensors().keys() == {
        f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")
    }
    module.save(tmp_path / "m_1", format="adapter-transformers")
    assert state(tmp_path / "m_1", BINS[1]).keys() == state(folder, BINS[1]).keys()
