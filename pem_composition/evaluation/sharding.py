"""A frozen base shared out among processes: each holds its part of every weight.

Sharding is FSDP2's (``torch.distributed.fsdp.fully_shard``, one unit per block and one for the
rest), reading transformers': the model is made without weights, and each process reads its slices
of the files. What is trained (module and head) is no part of it: every process holds it whole, and
the Trainer sums its gradients. So a module is extracted, saved and resumed as anywhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.distributed import DistributedConfig

from pem_composition.adapters.locate import plain_modules

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")
BLOCK = "free_full_weight"  # transformers' word: a unit whose weights go when it has computed


def keywords(factory: Any, config: PretrainedConfig, processes: int) -> dict[str, Any]:
    """What ``from_pretrained`` is told to shard a model over the processes of the launch.

    Units are the blocks of its stacks and what the architecture declares beside them. (Its default
    declaration, ``layers.*``, names no block of BERT, GPT-2 or T5.)
    """
    with torch.device("meta"):
        model = factory.from_config(config)
    plan = dict.fromkeys(stacks(model), BLOCK)
    return {"distributed_config": DistributedConfig(fsdp_size=processes, fsdp_plan=plan)}


def stacks(model: nn.Module) -> list[str]:
    """The blocks of each outermost list of modules, as ``encoder.layer.*``."""
    found: list[str] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(outer.removesuffix("*")) for outer in found)
        if (
            isinstance(module, nn.ModuleList)
            and not inner
            and any(True for _ in module.parameters())
        ):
            found.append(f"{name}.*")
    return found


def is_sharded(model: nn.Module) -> bool:
    """True for a model that holds a part of its weights."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; each of them has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def replicate(model: PreTrainedModel, names: Iterable[str], new: Iterable[str], seed: int) -> None:
    """Give every process all of these parameters: a head, which is trained whole.

    Those that are new are drawn again, as one process draws them.

    Args:
        names: parameters.
        new: those of them that the checkpoint lacked.
    """
    if not is_sharded(model):
        return
    modules, wanted, drawn = plain_modules(model), set(names), set(new)
    transformers.set_seed(seed)
    for path, module in modules.items():
        own = {n: p for n, p in module._parameters.items() if f"{path}.{n}" in wanted}
        if not own:
            continue
        apart = copy.copy(module)
        values = {n: nn.Parameter(whole(p.detach()).clone()) for n, p in own.items()}
        apart._parameters = {**module._parameters, **values}
        if drawn & {f"{path}.{n}" for n in own}:
            with torch.no_grad():
                model._init_weights(apart)
        above, _, local = path.rpartition(".")
        setattr(modules[above] if above else model, local, apart)


def run_whole(model: nn.Module, work: Callable[[nn.Module], T]) -> T:
    """``work(model)`` with the weights that belong to no block whole until it is done.

    For work that calls parts of the model, an encoder say. All processes do it together: a block
    gathers its weights whenever it is called, so each of them has to call it as often.
    """
    if not is_sharded(model):
        return work(model)
    model._work = lambda: work(model)
    register_fsdp_forward_method(model, "_work")
    try:
        done: T = model._work()
        return done
    finally:
        del model._work
