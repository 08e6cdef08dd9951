"""LoRA on stacks of experts (PEFT's target_parameters), against live PEFT and float64 NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
import peft
from support import one_meaning as om

import pem_composition as pem
from pem_composition.checkpoint import load
from pem_composition.errors import PEMError

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STACK = "model.layers.1.mlp.experts.down_proj"
NAMES = ("mixtral", "gpt oss")  # (E, d_out, d_in) and (E, d_in, d_out)


def made(name: str, folder: Path, seed: int, **options):
    """A live PEFT model and the folder of its module."""
    with om.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(**{"lora_alpha": 5, "init_lora_weights": False, **options})
        model = peft.get_peft_model(om.fresh(om.BY_NAME[name], base(name, folder)), config)
        model.save_pretrained(folder / str(seed))
    return model.eval()


def base(name: str, folder: Path) -> Path:
    return om.base_folder(om.BY_NAME[name], folder)


def dense(model) -> dict[str, np.ndarray]:
    """PEFT's own update of every stack, in float64."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            stack = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            found[stack] = module.double().get_delta_weight("default").detach().numpy()
            module.float()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_sum_is_that_of_the_dense_updates(name: str, tmp_path: Path) -> None:
    """Other ranks, alphas and targets; and its best approximation of a share of the energy."""
    live = [
        made(name, tmp_path, 0, r=2, target_parameters=BOTH, target_modules=["q_proj"]),
        made(name, tmp_path, 1, r=3, target_parameters=[BOTH[0], "down_proj"], target_modules=[],
             use_rslora=True),
    ]  # fmt: skip
    a, b = (load(tmp_path / str(i)) for i in range(2))
    exact = {n: dense(live[0])[n] - 0.5 * dense(live[1]).get(n, 0.0) for n in dense(live[0])}
    for rank in (None, 0.8):
        result = pem.combine([a, b], [1.0, -0.5], space="delta", rank=rank)
        result.save(tmp_path / f"sum-{rank}")
        with om.quiet():
            model = om.fresh(om.BY_NAME[name], base(name, tmp_path))
            written = dense(peft.PeftModel.from_pretrained(model, tmp_path / f"sum-{rank}"))
        assert written.keys() == exact.keys()
        for n, dW in exact.items():
            for i, (found, want) in enumerate(zip(written[n], dW, strict=True)):
                U, S, Vh = np.linalg.svd(want, full_matrices=False)
                energies = np.square(S)
                k = 1 + int((energies.cumsum() < (rank or 1 - 1e-9) * energies.sum()).sum())
                np.testing.assert_allclose(found, U[:, :k] * S[:k] @ Vh[:k], atol=2e-6)
                if rank:
                    assert len(result.tensors[f"{n}[{i}].lora_A"]) == k


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_in_peft(name: str, tmp_path: Path) -> None:
    live = made(name, tmp_path, 0, r=2, target_parameters=BOTH, target_modules=["q_proj"])
    m = om.BY_NAME[name]
    model = om.fresh(m, base(name, tmp_path))
    with pem.attach(model, load(tmp_path / "0"), trainable=True) as attachment:
        for one in (live, model):
            one(**om.inputs(m.inputs)).logits.square().mean().backward()
        A = live.base_model.model.model.layers[1].mlp.experts.lora_A["default"].weight.grad
        B = live.base_model.model.model.layers[1].mlp.experts.lora_B["default"].weight.grad
        for i in range(3):
            own = attachment._held.adapters[f"{STACK}[{i}]"]
            torch.testing.assert_close(own.lora_A.grad, A.reshape(3, 2, -1)[i])
            torch.testing.assert_close(own.lora_B.grad, B.reshape(len(B), 2, 3)[:, :, i])


def test_several_are_attached_switched_and_taken_off(tmp_path: Path) -> None:
    m = om.BY_NAME["mixtral"]
    for seed in (0, 1):
        made("mixtral", tmp_path, seed, r=2, target_parameters=BOTH, target_modules=[])
    a, b = (load(tmp_path / str(i)) for i in range(2))
    model = om.fresh(m, base("mixtral", tmp_path))
    before = om.snapshot(model)
    with pem.attach(model, pem.combine([a, b], [1.0, 0.5], space="delta")):
        both = om.output(model, m.inputs)
    with pem.attach(model, a):
        first = om.output(model, m.inputs)
    with pem.attach(model, a, name="a"), pem.attach(model, b, name="b") as held:
        pem.adapters.set_multiplier(model, "b", 0.5)
        torch.testing.assert_close(om.output(model, m.inputs), both, rtol=1e-4, atol=1e-5)
        held.swap(a)
        pem.adapters.set_active(model, "b")
        pem.adapters.set_multiplier(model, "b", 1.0)
        torch.testing.assert_close(om.output(model, m.inputs), first, rtol=1e-4, atol=1e-5)
    om.same_model(model, before)


def test_what_the_file_does_not_tell_is_refused_by_name(tmp_path: Path) -> None:
    made("mixtral", tmp_path, 0, r=2, target_parameters=BOTH, target_modules=[])
    folder = tmp_path / "0"
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    first = {n: t for n, t in tensors.items() if "base_layer" in n}

    def refused(words: str, tensors=tensors, **changes) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(PEMError, match=words):
            load(folder)

    refused(r"in the model's code alone; found w1, w2", target_parameters=["w1", "w2"])
    refused("found factors of 2, expected factors of 1", target_parameters=BOTH[:1])
    refused("found factors of 1, expected factors of 2", first)
    refused("is one matrix, no stack of experts", r=6)
    refused("a multiple of the rank 4", r=4)
    swapped = {
        n.replace("experts.", "experts.base_layer.") if "base_layer" not in n
        else n.replace("base_layer.", ""): t for n, t in tensors.items()
    }  # fmt: skip
    refused("do not fit each other; found 24 -> 16 and 16 -> 48", swapped)


def test_a_stack_of_another_size_is_refused(tmp_path: Path) -> None:
    made("mixtral", tmp_path, 0, r=2, target_parameters=BOTH[1:], target_modules=[])
    a = load(tmp_path / "0")
    some = {n: t for n, t in a.tensors.items() if "[2]" not in n}
    model = om.fresh(om.BY_NAME["mixtral"], base("mixtral", tmp_path))
    with pytest.raises(PEMError, match="does not fit the stack; found 2 experts, expected 3"):
        pem.attach(model, pem.module.PEM(some, a.config, a.base, "some"))
    with pytest.raises(PEMError, match=r"\(1, 16\) for a layer 16 -> 24|does not fit the layer"):
        wide = {n: t[:, :5] if n.endswith("lora_A") else t for n, t in a.tensors.items()}
        pem.attach(model, pem.module.PEM(wide, a.config, a.base, "wide"))
