"""What the programs for causal language models share: the model's flags and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pem_composition.cli.evaluate import NO_ADAPTER
from pem_composition.training.config import LoadFlags, flag, required

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Flags that say how a text goes on, by their names in ``Decoding``.
DECODING = ("max_new_tokens", "max_length", "temperature", "top_k", "top_p", "greedy")


@dataclass(frozen=True, kw_only=True)
class CausalFlags(LoadFlags):
    """A causal language model, alone or with a module."""

    model_name_or_path: str = required(
        "base model, or a fully fine-tuned one: GPT-2, Llama or another decoder"
    )
    adapter: str = flag(NO_ADAPTER, "module directory to attach, or none")
    batch_size: int | None = flag(None, "rows per forward pass; default: by the device")
    bf16: bool = flag(False, "compute in bfloat16: faster where the processor has it")
    allow_base_mismatch: bool = flag(False, "take a module of another base model all the same")
    use_cpu: bool = flag(False, "do not use a GPU")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model with the module attached, on its device.

        Raises:
            CheckpointError, IncompatibleModules: a model or module that cannot be used.
        """
        import torch

        from pem_composition.adapters import attach
        from pem_composition.cli.evaluate import load_module
        from pem_composition.evaluation.models import load_causal
        from pem_composition.tasks.polarity import LANGUAGE

        self.check_load()
        alone = self.adapter == NO_ADAPTER
        module = None if alone else load_module(self, LANGUAGE)  # type: ignore[arg-type]
        model, tokenizer, _ = load_causal(self.model_name_or_path, holding=self.holding)
        if module is not None:
            attach(model, module, allow_base_mismatch=self.allow_base_mismatch)
        if self.holding.placed:
            return model, tokenizer
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        return model.to("cuda" if on_gpu else "cpu"), tokenizer  # type: ignore[arg-type]

    def precision(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Within, the model computes in the precision of the flags."""
        from pem_composition.evaluation.models import bfloat16_note
        from pem_composition.evaluation.precision import reduced

        note = bfloat16_note(model.device.type) if self.bf16 else None
        if note:
            print(note)
        return reduced(model, self.bf16)
