"""PEFT's layout: every golden module, what plain PEFT makes of ours, and every refusal by name."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.rounding import assert_within_rounding
from support.small_modules import ia3, lora, updates
from torch import Tensor

import pem_composition as pem
from pem_composition.checkpoint import inspect_header, load, open_module, peft_config
from pem_composition.config import BaseIdentity, IA3Config, LoraConfig
from pem_composition.errors import CheckpointError, PEMError, UnsupportedModule
from pem_composition.module import PEM, HeadInfo
from pem_composition.safe_files import read_json

FAMILIES = ("roberta", "t5", "gpt2", "llama")
MODULES = [f"{f}_{k}_{i}" for f in FAMILIES for k in ("lora", "rslora", "ia3") for i in (1, 2, 3)]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_B = "roberta.encoder.layer.1.attention.self.query.lora_B"


def same(a: PEM, b: PEM) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype
        assert torch.equal(tensor, b.tensors[name]), name


@lru_cache
def recorded(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "logits.safetensors")


def peft_logits(
    base: Path, adapter: Path, input_ids: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What plain PEFT computes with an adapter folder."""
    import transformers
    from peft import PeftModel

    kind = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval().to(dtype)
    decoder = {"decoder_input_ids": input_ids[:, :4]} if kind.startswith("T5") else {}
    with torch.no_grad():
        return model(input_ids=input_ids, **decoder).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_golden_modules_come_back_bit_for_bit_and_open_in_plain_peft(
    shared: Path, tmp_path: Path, name: str
) -> None:
    golden = shared / "golden" / "peft"
    module = load(golden / name)
    original = load_file(golden / name / WEIGHTS)
    assert len(module.tensors) == len(original)
    for key, tensor in original.items():
        ours = module.tensors[canonical(key)]
        assert torch.equal(ours.reshape(tensor.shape), tensor)
    module.save(tmp_path / "out")
    again = load(tmp_path / "out")
    same(module, again)
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(written[k], v) for k, v in original.items())
    logits = recorded(golden)
    base = golden / f"base_{name.split('_')[0]}"
    found = peft_logits(base, tmp_path / "out", logits["input_ids"])
    assert torch.equal(found, peft_logits(base, golden / name, logits["input_ids"]))
    exact = peft_logits(base, tmp_path / "out", logits["input_ids"], torch.float64)
    assert_within_rounding(logits[f"{name}.logits"], found, exact)


def canonical(key: str) -> str:
    rest = key.removeprefix(PREFIX)
    for suffix, role in (
        (".lora_A.weight", "lora_A"),
        (".lora_B.weight", "lora_B"),
        (".ia3_l", "ia3"),
    ):
        if rest.endswith(suffix):
            return f"{rest.removesuffix(suffix)}.{role}"
    return f"{rest}.head"


def test_full_layer_names_and_patterns_open_in_plain_peft(shared: Path, tmp_path: Path) -> None:
    """Own rank and alpha for one layer of many: PEFT must not touch the others."""
    golden = shared / "golden" / "peft"
    layers = [f"model.layers.{i}.self_attn.{p}" for i, p in ((0, "q_proj"), (1, "v_proj"))]
    out_features = {"q_proj": 32, "v_proj": 16}
    generator = torch.Generator().manual_seed(0)
    tensors, update = {}, {}
    config = LoraConfig(
        2,
        3.0,
        tuple(layers),
        use_rslora=True,
        rank_pattern={layers[1]: 5},
        alpha_pattern={layers[1]: 7},
    )
    for layer in layers:
        r, out = config.rank(layer), out_features[layer.rpartition(".")[2]]
        a, b = torch.randn(r, 32, generator=generator), torch.randn(out, r, generator=generator)
        tensors |= {f"{layer}.lora_A": a, f"{layer}.lora_B": b}
        update[f"{layer}.weight"] = config.scaling(layer) * b.double() @ a.double()
    PEM(tensors, config).save(tmp_path / "out")
    import transformers

    ids = recorded(golden)["input_ids"]
    model = transformers.LlamaForCausalLM.from_pretrained(golden / "base_llama").eval().double()
    with torch.no_grad():
        for name, delta in update.items():
            model.get_parameter(name).add_(delta)
        expected = model(input_ids=ids).logits
    found = peft_logits(golden / "base_llama", tmp_path / "out", ids, torch.float64)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-9)


# --- a module made here, and every way to break it ----------------------------------------------


def tensors_of(layers: int = 3, r: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = {}
    for i in range(layers):
        for part in ("query", "value"):
            layer = f"roberta.encoder.layer.{i}.attention.self.{part}"
            out[f"{layer}.lora_A"] = torch.randn(r, 6, generator=generator)
            out[f"{layer}.lora_B"] = torch.randn(6, r, generator=generator)
    out["classifier.dense.weight.head"] = torch.randn(6, 6, generator=generator)
    out["classifier.out_proj.weight.head"] = torch.randn(2, 6, generator=generator)
    return out


def example() -> PEM:
    return PEM(
        tensors_of(),
        LoraConfig(2, 4, ("query", "value"), dropout=0.1),
        BaseIdentity("some/base", "f" * 64, "roberta", 6),
        head=HeadInfo(("no", "yes"), "classification"),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    example().save(tmp_path / "module")
    (tmp_path / "module" / "pem.json").unlink()
    config = json.loads((tmp_path / "module" / CONFIG).read_text())
    # what PEFT writes beside the keys that matter
    config |= {"peft_version": "0.21.2", "loftq_config": {}, "megatron_core": "megatron.core"}
    (tmp_path / "module" / CONFIG).write_text(json.dumps(config))
    return tmp_path / "module"


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def refused(folder: Path, *words: str, kind: type[PEMError] = CheckpointError) -> None:
    """Refused from the header alone and on loading, in one line that holds the words."""
    for read in (inspect_header, load):
        with pytest.raises(kind) as error:
            read(folder)
        text = str(error.value)
        assert "\n" not in text
        for word in (str(folder), *words):
            assert word in text, text


def test_everything_but_the_values_survives_a_round_trip(tmp_path: Path) -> None:
    module = example()
    module.save(tmp_path / "m")
    again = load(tmp_path / "m")
    same(module, again)
    assert (again.config.r, again.config.alpha, again.config.dropout) == (2, 4, 0.1)
    assert again.config.target_modules == ("query", "value")
    assert (again.base, again.head, again.name) == (module.base, module.head, "m")
    header = inspect_header(tmp_path / "m")
    assert header.head_shapes["classifier.out_proj.weight"] == (2, 6)
    assert header.shapes["roberta.encoder.layer.0.attention.self.query.lora_A"] == (2, 6)


DIALECTS = [
    ("lora_bias", True, "lora_bias"),
    ("bias", "all", "bias"),
    ("init_lora_weights", "pissa", "'pissa'"),
    ("init_lora_weights", "pissa_niter_4", "'pissa_niter_4'"),
    ("init_lora_weights", "olora", "'olora'"),
    ("init_lora_weights", "corda", "'corda'"),
    ("init_lora_weights", "loftq", "'loftq'"),
    ("init_lora_weights", "lora_ga", "'lora_ga'"),
    ("init_lora_weights", 1, "init_lora_weights"),
    ("trainable_token_indices", [1, 2], "trainable_token_indices"),
    ("target_parameters", ["x"], "target_parameters"),
    ("layer_replication", [[0, 2]], "layer_replication"),
    ("megatron_config", {"a": 1}, "megatron_config"),
    ("loftq_config", {"loftq_bits": 4}, "loftq_config"),
    ("use_qalora", True, "use_qalora"),
    ("use_bdlora", {"nblocks": 2}, "use_bdlora"),
    ("kasa_config", {"beta": 1.0}, "kasa_config"),
    ("alora_invocation_tokens", [1], "alora_invocation_tokens"),
    ("arrow_config", {"top_k": 3}, "arrow_config"),
    ("monteclora_config", {"x": 1}, "monteclora_config"),
    ("velora_config", {"x": 1}, "velora_config"),
    ("peft_type", "LOHA", "'LOHA'"),
]


@pytest.mark.parametrize(("key", "value", "word"), DIALECTS)
def test_what_cannot_be_represented_is_refused_by_name(
    folder: Path, key: str, value: object, word: str
) -> None:
    refused(edit(folder, **{key: value}), word, "found", "expected", kind=UnsupportedModule)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_alone_are_read(folder: Path, init: object) -> None:
    assert load(edit(folder, init_lora_weights=init)).kind == "lora"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_alpha", 0),
        ("lora_alpha", -1),
        ("lora_alpha", [8]),
        ("r", "2"),
        ("r", True),
        ("r", 2.0),
        ("r", 0),
        ("r", 10**9),
        ("lora_dropout", 1.0),
        ("lora_dropout", "x"),
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("fan_in_fan_out", 0),
        ("target_modules", [1]),
        ("modules_to_save", "classifier"),
        ("rank_pattern", [1]),
        ("rank_pattern", {"query": "2"}),
        ("alpha_pattern", {"query": 0}),
        ("task_type", 3),
        ("base_model_name_or_path", 7),
    ],
)
def test_wrong_types_are_refused(folder: Path, key: str, value: object) -> None:
    refused(edit(folder, **{key: value}), key, "found", "expected")


def test_a_module_that_is_let_go_closes_its_files(folder: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tensor = next(iter(open_module(folder).tensors.values()))
        assert len(tensor)
    assert [str(w.message) for w in said if w.category is ResourceWarning] == []


def test_nan_in_the_config_is_refused(folder: Path) -> None:
    text = (folder / CONFIG).read_text().replace('"lora_alpha": 4', '"lora_alpha": NaN')
    (folder / CONFIG).write_text(text)
    refused(folder, "NaN")


@pytest.mark.parametrize("key", ["r", "lora_alpha", "peft_type", "use_rslora", "use_dora"])
def test_missing_keys_are_not_filled_with_defaults(folder: Path, key: str) -> None:
    refused(edit(folder, **{key: ...}), f"{key} is missing", "expected")


def test_a_config_older_than_rslora_and_dora_is_read(folder: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
    config |= {"modules_to_save": ["classifier"], "enable_lora": None, "merge_weights": False}
    (folder / CONFIG).write_text(json.dumps(config))
    assert load(folder).config.scaling("x.query") == 2.0


def test_unknown_keys(folder: Path) -> None:
    neutral = {"future_a": None, "future_b": False, "future_c": {}, "future_d": []}
    assert load(edit(folder, **neutral)).kind == "lora"
    refused(edit(folder, lora_alfa=16), "'lora_alfa'", "'lora_alpha'", "16")
    refused(edit(folder, lora_alfa=..., future_e=3), "'future_e'", "3")


def test_a_regular_expression_is_never_run(folder: Path) -> None:
    layers = load(folder).layers
    bomb = load(edit(folder, target_modules="(a+)+" * 30 + "$"))
    assert bomb.config.target_modules == bomb.layers == layers
    bomb = load(edit(folder, target_modules=["query", "value"], alpha_pattern={"(a+)+b" * 30: 3}))
    assert bomb.config.alpha_pattern == {}  # nor written, for PEFT to run
    bomb = edit(folder, alpha_pattern={"(?=a)query": 3})
    refused(bomb, "alpha_pattern", "(?=a)query", "assert", kind=UnsupportedModule)


KEY = PREFIX + "roberta.encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KEY + ".lora_A.weight"), ("missing tensor", "layer.1", "lora_B only")),
        (lambda t: t.pop(KEY + ".lora_B.weight"), ("missing tensor", "layer.1", "lora_A only")),
        (lambda t: [t.pop(k) for k in list(t) if "lora" in k], ("no adapter tensors",)),
        (
            lambda t: t.update({PREFIX + "score.weight": torch.ones(2)}),
            ("extra tensor", "score.weight"),
        ),
        (
            lambda t: t.update({"roberta.x.lora_A.weight": torch.ones(2, 6)}),
            ("prefix", "base_model.model."),
        ),
        (
            lambda t: t.update({KEY + ".lora_A.weight": torch.ones(3, 6)}),
            ("rank", "(3, 6)", "rank 2"),
        ),
        (lambda t: t.update({KEY + ".lora_A.weight": torch.ones(2, 6).int()}), ("I32", "F32")),
        (lambda t: t.update({KEY + ".lora_magnitude_vector": torch.ones(6)}), ("DoRA magnitudes",)),
        (lambda t: t.update({KEY + ".lora_embedding_A": torch.ones(2, 6)}), ("embedding",)),
        (lambda t: t.update({KEY + ".lora_B.bias": torch.ones(6)}), ("bias of a LoRA factor",)),
        (lambda t: t.update({KEY + ".lora_A.default.weight": torch.ones(2, 6)}), ("live model",)),
        (lambda t: t.update({KEY + ".lora_A.weight": torch.ones(2, 6, 1, 1)}), ("convolution",)),
        (
            lambda t: t.update({KEY + ".ia3_l": torch.ones(6, 1)}),
            ("does not fit the config", "ia3"),
        ),
        (lambda t: t.clear(), ("no tensors",)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, change: Any, words: tuple[str, ...]
) -> None:
    refused(retensor(folder, change), *words)


def test_layers_left_out_on_purpose_are_read(folder: Path) -> None:
    retensor(folder, lambda t: [t.pop(k) for k in list(t) if "layer.1." in k])
    module = load(edit(folder, layers_to_transform=[0, 2]))
    assert module.config.target_modules == module.layers
    assert len(module.layers) == 4


def test_layers_targets_and_heads_that_a_model_need_not_have_are_no_fault(folder: Path) -> None:
    """PEFT takes targets that some layers lack, and lists classifiers that a model may not have."""
    retensor(folder, lambda t: [t.pop(k) for k in list(t) if KEY in k or "classifier" in k])
    edit(folder, target_modules=["query", "value", "self.query", "w1"])
    edit(folder, modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    header = inspect_header(folder)
    assert len(header.layers) == 5 and header.head is None
    assert [note.partition(": ")[2] for note in header.notes] == [
        "modules_to_save names 'classifier', 'score', for which there is no tensor",
        "target_modules names 'w1', for which there is no tensor",
    ]
    refused(edit(folder, modules_to_save=["pooler"]), "missing tensors", "'pooler'")


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda key: f"module.{key}",
        lambda key: key.replace(PREFIX, PREFIX + "module._orig_mod."),
        lambda key: key.replace(".layer.1.", ".layer.1._fsdp_wrapped_module."),
        lambda key: key.replace(".attention.", "._checkpoint_wrapped_module.attention."),
    ],
)
def test_names_with_wrappers_are_those_of_the_model(
    folder: Path, shared: Path, wrapped: Callable[[str], str]
) -> None:
    plain = load(folder)

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[wrapped(key)] = tensors.pop(key)

    retensor(folder, rename)
    same(load(folder), plain)
    one = KEY + ".lora_A.weight"
    retensor(folder, lambda t: t.update({one: t[wrapped(one)].clone()}))
    if wrapped(one) != one:
        refused(folder, "two tensors", wrapped(one), one)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_refused_by_tensor(folder: Path, value: float) -> None:
    retensor(folder, lambda t: t[KEY + ".lora_A.weight"].__setitem__((0, 0), value))
    assert inspect_header(folder).kind == "lora"
    with pytest.raises(CheckpointError, match="1 NaN or infinite of 12 values") as error:
        load(folder)
    assert KEY in str(error.value)


def test_tensors_on_demand_are_those_of_the_file_that_was_opened(
    folder: Path, tmp_path: Path
) -> None:
    at_once, later = load(folder), load(folder, on_demand=True)
    same(later, at_once)
    assert later.layers == at_once.layers
    assert later.head_tensors().keys() == at_once.head_tensors().keys()
    shutil.copytree(folder, tmp_path / "other")
    retensor(tmp_path / "other", lambda t: t[KEY + ".lora_B.weight"].add_(1))
    (tmp_path / "other" / WEIGHTS).replace(folder / WEIGHTS)  # as every program here overwrites
    same(later, at_once)
    assert not torch.equal(load(folder).tensors[LORA_B], at_once.tensors[LORA_B])


def test_tensors_on_demand_of_a_file_written_to_meanwhile_are_refused(folder: Path) -> None:
    later = load(folder, on_demand=True)
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"0000")
    os.utime(folder / WEIGHTS, ns=(0, 0))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        _ = later.tensors[LORA_B]


@pytest.mark.parametrize("on_demand", [False, True])
def test_the_values_are_those_of_the_file_whose_header_was_read(
    folder: Path, tmp_path: Path, on_demand: bool
) -> None:
    before, header, other = load(folder), open_module(folder), open_module(folder)
    shutil.copytree(folder, tmp_path / "other")
    retensor(tmp_path / "other", lambda t: t[KEY + ".lora_B.weight"].add_(1))
    (tmp_path / "other" / WEIGHTS).replace(folder / WEIGHTS)
    same(load(header, on_demand=on_demand), before)
    assert other.tensors is not None
    other.tensors.close()  # then the name is all that is left of the file
    with pytest.raises(CheckpointError, match="changed while it was read"):
        load(other, on_demand=on_demand)


def test_tensors_on_demand_are_checked_when_they_are_read(folder: Path) -> None:
    retensor(folder, lambda t: t[KEY + ".lora_B.weight"].__setitem__((0, 0), float("nan")))
    later = load(folder, on_demand=True)
    with pytest.raises(CheckpointError, match="1 NaN or infinite of 12 values"):
        _ = later.tensors[LORA_B]


def test_half_precision_is_held_in_float32_and_double_kept(tmp_path: Path) -> None:
    module = example()
    for dtype, held in (
        ("float16", torch.float32),
        ("bfloat16", torch.float32),
        ("float64", torch.float64),
    ):
        module.save(tmp_path / dtype, dtype=dtype)
        again = load(tmp_path / dtype)
        for name, tensor in module.tensors.items():
            assert again.tensors[name].dtype == held
            assert torch.equal(again.tensors[name], tensor.to(getattr(torch, dtype)).to(held))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("make", ["sum", "log", "rank", "negation", "rounded before"])
def test_the_certificate_in_the_file_is_that_of_the_values_in_the_file(dtype, make, tmp_path):
    """Against dense float64; unknown where the operands are no longer at hand."""
    kind = ia3 if make == "log" else lora
    a, b = kind(1), kind(2)
    exact = {n: 0.5 * u - 0.3 * updates(b)[n] for n, u in updates(a).items()}
    if make == "negation":
        module, exact = pem.negate(a, 0.7), {n: -0.7 * u for n, u in updates(a).items()}
    elif make == "log":
        module = pem.combine([a, b], [0.5, -0.3], space="log")
        logs = [{n: np.log1p(u) for n, u in updates(m).items()} for m in (a, b)]
        exact = {n: np.expm1(0.5 * logs[0][n] - 0.3 * logs[1][n]) for n in logs[0]}
    else:
        rank = 2 if make == "rank" else None
        before = dtype if make == "rounded before" else None
        module = pem.combine([a, b], [0.5, -0.3], space="delta", rank=rank, dtype=before)
    module.save(tmp_path / "m", dtype=dtype)
    found = read_json(tmp_path / "m" / "pem.json", tmp_path)
    certificate = found["certificate"]
    if make in ("rank", "negation"):
        assert certificate["total"] is None and set(certificate["layers"].values()) == {None}
        assert any(f"rounded to {dtype} when saved" in note for note in found["notes"])
        return
    written = updates(load(tmp_path / "m"))
    errors = {n: np.linalg.norm(written[n] - u) for n, u in exact.items()}
    norms = {n: np.linalg.norm(u) for n, u in exact.items()}
    for n, error in errors.items():
        assert certificate["layers"][n] == pytest.approx(error / norms[n], rel=1e-5)
    total = np.linalg.norm(list(errors.values())) / np.linalg.norm(list(norms.values()))
    assert certificate["total"] == pytest.approx(total, rel=1e-5) and total > 0


def test_a_value_that_overflows_the_dtype_is_refused_and_nothing_written(tmp_path: Path) -> None:
    module = example()
    big = {n: t * (1e6 if n.endswith("lora_B") else 1) for n, t in module.tensors.items()}
    with pytest.raises(PEMError, match=r"overflows in torch.float16") as error:
        PEM(big, module.config).save(tmp_path / "out", dtype="float16")
    assert "bfloat16" in str(error.value)
    with pytest.raises(PEMError, match="found 'int8', expected float32"):
        module.save(tmp_path / "out", dtype="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "dtype", "held"),
    [
        (3.4e38, "bfloat16", "float32"),
        (1e39, "float32", "float64"),
        (1e39, "float16", "float64"),
    ],
)
def test_the_dtype_that_a_refusal_names_holds_the_value(
    value: float, dtype: str, held: str, tmp_path: Path
) -> None:
    big = PEM({"fc.ia3": torch.tensor([1.0, value], dtype=torch.float64)}, IA3Config(("fc",)))
    with pytest.raises(PEMError, match=rf"overflows in torch.{dtype}; .*choose --dtype {held}$"):
        big.save(tmp_path / "out", dtype=dtype)
    big.save(tmp_path / "out", dtype=held)
    assert float(load(tmp_path / "out").tensors["fc.ia3"][1]) == pytest.approx(value)


def test_weights_as_bin_and_both_files(folder: Path) -> None:
    expected = load(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    both = load(folder)
    assert any("adapter_model.bin" in note for note in both.provenance.notes)
    (folder / WEIGHTS).unlink()
    same(load(folder), expected)
    assert inspect_header(folder).shapes["roberta.encoder.layer.0.attention.self.query.lora_B"] == (
        6,
        2,
    )


def test_a_module_in_a_subfolder(folder: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.copytree(folder, outer / "a")
    same(load(outer), load(folder))
    shutil.copytree(folder, outer / "b")
    refused(outer, "several modules", "a, b", "name the subfolder")


def test_paths_that_hold_no_module(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "found an empty directory", "expected adapter_config.json")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    refused(tmp_path / "empty", "found notes.txt")
    (folder / WEIGHTS).unlink()
    refused(folder, "no weights", CONFIG, WEIGHTS)
    os.mkfifo(folder / WEIGHTS)
    refused(folder, "a FIFO")


def test_a_truncated_file(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-4])
    refused(folder, WEIGHTS, "cover the file exactly")


def test_ia3_placement_must_fit_the_shapes(tmp_path: Path) -> None:
    tensors = {}
    for i in range(2):
        tensors[f"m.layer.{i}.key.ia3"] = torch.rand(6)
        tensors[f"m.layer.{i}.output.dense.ia3"] = torch.rand(9)
    module = PEM(tensors, IA3Config(("key", "output.dense"), ("output.dense",)))
    module.save(tmp_path / "m")
    same(load(tmp_path / "m"), module)
    (tmp_path / "m" / "pem.json").unlink()
    refused(edit(tmp_path / "m", feedforward_modules=[]), "(1, 9)", "(d, 1) otherwise")
    refused(edit(tmp_path / "m", feedforward_modules=...), "feedforward_modules is missing")


def test_finer_feedforward_names_are_written_so_that_peft_accepts_them(tmp_path: Path) -> None:
    tensors = {f"m.layer.{i}.fc.ia3": torch.rand(6) for i in range(2)}
    module = PEM(tensors, IA3Config(("fc",), ("m.layer.1.fc",)))
    module.save(tmp_path / "m")
    written = json.loads((tmp_path / "m" / CONFIG).read_text())
    assert set(written["feedforward_modules"]) <= set(written["target_modules"])
    again = load(tmp_path / "m")
    assert [again.config.scales_input(n) for n in again.layers] == [False, True]


def test_known_keys_cover_the_installed_peft() -> None:
    """A key PEFT adds in a later version must be looked at before it is accepted."""
    from dataclasses import fields

    import peft

    for config, kind in ((peft.LoraConfig, "lora"), (peft.IA3Config, "ia3")):
        known = {
            *peft_config.COMMON_KEYS,
            *peft_config.CONFIG_KEYS[kind],
            *peft_config.HARMLESS_KEYS,
        }
        known |= {*peft_config.REFUSED_KEYS, "bias"}
        assert {f.name for f in fields(config)} <= known
