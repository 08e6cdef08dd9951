"""Samples of one prompt in batches and one by one: seconds, tokens per second, and their ratio.

batched       all samples in one batch
one by one    a batch of one, the reference's way; with --single N of N samples only, as each takes
              the same time, and the seconds are scaled to all of them
transformers  ``model.generate`` of the same batch, sampling by its own settings

Every candidate writes texts of full length: no end token is heeded, so that all do the same work.

  python scripts/benchmarks/generation.py --model smollm2-135m-instruct [--samples 64] [--tokens 64]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timing import report

from pem_composition.evaluation.decoding import Sampling
from pem_composition.evaluation.models import load_causal
from pem_composition.evaluation.text_sampling import batches

BATCHED, SINGLE, THEIRS = "batched", "one by one", "transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a decoder")
    parser.add_argument("--prompt", default="I don't care if this is controversial")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per sample")
    parser.add_argument("--single", type=int, help="samples written one by one; default: all")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(args.model, args.prompt, args.samples, device)
    single = min(args.single or args.samples, args.samples)
    for call in case.candidates(single, tokens=2).values():
        call()  # warm-up
    seconds = rounds(case.candidates(single, args.tokens), args.runs)
    seconds[SINGLE] = [value * args.samples / single for value in seconds[SINGLE]]
    print(f"\n{args.model}, {args.samples} samples of {args.tokens} tokens, {device}\n")
    report(seconds, base=BATCHED)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: args.samples * args.tokens / s for name, s in middle.items()}
    print("\n" + ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items()))
    print(f"batched beside one by one: {middle[SINGLE] / middle[BATCHED]:.1f} x")


def rounds(candidates: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each candidate, A B C A B C ..."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(runs):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


class Case:
    """A model and what it is asked."""

    def __init__(self, name: str, prompt: str, samples: int, device: str) -> None:
        self.model, self.tokenizer, _ = load_causal(name)
        self.model.to(device)
        self.prompt, self.samples = prompt, samples
        self.tokenizer.eos_token = self.model.generation_config.eos_token_id = None

    def candidates(self, single: int, tokens: int) -> dict[str, Callable[[], object]]:
        """Each way as a call that writes every sample once, or ``single`` of them."""
        return {
            BATCHED: lambda: self.ours(self.samples, self.samples, tokens),
            SINGLE: lambda: self.ours(single, 1, tokens),
            THEIRS: lambda: self.theirs(tokens),
        }

    def ours(self, samples: int, batch_size: int, tokens: int) -> None:
        """Our loop; every text must have its full length."""
        written = batches(
            self.model, self.tokenizer, [self.prompt], Sampling(max_new_tokens=tokens),
            samples=samples, batch_size=batch_size,
        )  # fmt: skip
        assert [text.new_tokens for batch in written for text in batch] == [tokens] * samples

    def theirs(self, tokens: int) -> None:
        """The library's own sampling."""
        batch = self.tokenizer([self.prompt] * self.samples, return_tensors="pt")
        self.model.generate(
            **batch.to(self.model.device), do_sample=True, max_new_tokens=tokens,
            min_new_tokens=tokens, top_k=0, pad_token_id=0,
        )  # fmt: skip


if __name__ == "__main__":
    main()
