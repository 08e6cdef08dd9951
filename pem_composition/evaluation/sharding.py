"""A model shared out among processes: each holds its part of every weight.

Sharding is FSDP2's (``torch.distributed.fsdp.fully_shard``, one unit per block and one for the
rest), reading transformers': the model is made without weights, and each process reads its slices
of the files. A module that is trained on it (with its head) is no part of that: every process holds
it whole, and the Trainer sums its gradients, so it is extracted, saved and resumed as anywhere
else. A model that is trained itself stays shared out, its gradients and the optimizer's state too;
it is written tensor by tensor (``by_one``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
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


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights, which evaluations leave behind: what is held is the parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; each of them has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a value that every process has, where ``like`` is shared out."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by the names they are saved under; tied ones are one tensor."""
    reshard(model)
    tensors = model.state_dict(keep_vars=True)
    tied = [n for n, o in model.all_tied_weights_keys.items() if tensors.get(n) is tensors.get(o)]
    found: dict[int, str] = {}
    for name in [n for n in tensors if n not in tied] + tied:
        found.setdefault(id(tensors[name]), name)
    return {name: tensors[name] for name in tensors if found[id(tensors[name])] == name}


def by_one(model: PreTrainedModel, write: Callable[[Callable[[str], Tensor]], T]) -> T:
    """``write(fetch)`` on the first process; ``fetch(name)`` gathers a whole tensor on the CPU.

    The others are in ``lend`` meanwhile. No process holds more than its parts and one tensor.
    """
    tensors = stored_tensors(model)
    number = {name: i for i, name in enumerate(tensors)}

    def fetch(name: str) -> Tensor:
        _told(number[name], tensors)
        return whole(tensors[name].detach()).cpu()

    try:
        return write(fetch)
    finally:
        _told(-1, tensors)


def lend(model: PreTrainedModel) -> None:
    """Take part in gathering what the first process asks for in ``by_one``, until it is done."""
    tensors = stored_tensors(model)
    values = list(tensors.values())
    while (number := _told(0, tensors)) >= 0:
        whole(values[number].detach())


def _told(number: int, tensors: dict[str, Tensor]) -> int:
    """The first process's number, on every process."""
    device = next(iter(tensors.values())).device
    told = torch.tensor(number, device=device)
    broadcast(told, src=0)
    return int(told)


def replicate(model: PreTrainedModel, names: Iterable[str], new: Iterable[str], seed: int) -> None:
    """Give every process all of these parameters: a head, which is trained whole.

    Those that are new are drawn again, as one process draws them.

    Args:
        names: parameters.
        new: those of them that the checkpoint lacked.
    """
    if not is_sharded(model):
        return
    modules = plain_modules(model)
    for path, held in _drawn(model, names, new, seed):
        above, _, local = path.rpartition(".")
        setattr(modules[above] if above else model, local, held)


@torch.no_grad()
def redraw(model: PreTrainedModel, new: Iterable[str], seed: int) -> None:
    """Draw these parameters, which the checkpoint lacked, again as one process draws them."""
    new = set(new)
    modules = plain_modules(model)
    for path, held in _drawn(model, new, new, seed):
        for name, parameter in modules[path]._parameters.items():
            if parameter is not None and f"{path}.{name}" in new:
                parameter.copy_(part(held._parameters[name].detach(), parameter))


def _drawn(
    model: PreTrainedModel, names: Iterable[str], new: Iterable[str], seed: int
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have these parameters, as copies that hold them whole, new ones drawn."""
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
        yield path, apart


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
