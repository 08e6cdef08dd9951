"""One optimizer step: our LoRA, PEFT's LoRA, and the bound that any adapter pays.

The bound is the same model with a frozen backbone whose activations still need gradients (the
embeddings' output does), without adapters: forward and backward through every layer, no update.

    python scripts/benchmarks/training_step.py [--model minilm] [--batch 16] [--length 64]
"""

from __future__ import annotations

import argparse

import peft
import torch
from timing import report, side_by_side

from pem_composition import offline
from pem_composition.adapters import attach_fresh, resolve_targets
from pem_composition.config import LoraConfig
from pem_composition.evaluation.models import load_base

R, ALPHA = 8, 8


def step_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> object:
    """Closure: forward, backward, AdamW on whatever is trainable."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    path = offline.resolve(args.model)
    bound, ours, theirs = (load_base(path, num_labels=2).model for _ in range(3))
    config = bound.config
    g = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, config.vocab_size, (args.batch, args.length), generator=g),
        "labels": torch.randint(0, 2, (args.batch,), generator=g),
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])

    bound.requires_grad_(False)
    bound.classifier.requires_grad_(True)
    bound.enable_input_require_grads()
    targets = resolve_targets(ours, "lora").target_modules
    attach_fresh(ours, LoraConfig(r=R, alpha=ALPHA, target_modules=targets), seed=0)
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=R, lora_alpha=ALPHA, target_modules=["query", "value"], modules_to_save=["classifier"]
        ),
    )
    models = {"frozen backbone (bound)": bound, "LoRA, ours": ours, "LoRA, PEFT": theirs}
    report(
        side_by_side({n: step_of(m, batch) for n, m in models.items()}, args.runs),
        base="frozen backbone (bound)",
    )


if __name__ == "__main__":
    main()
