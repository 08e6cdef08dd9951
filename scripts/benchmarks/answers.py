"""Ways to answer prompted rows, side by side: rows per second of scoring and of generation.

encoder alone         what every way needs; no way can be faster
label-word scoring    answers.py: also tells which rows greedy generation would answer validly
constrained           beam search over the answers (generation.py), on the same batches
free                  greedy generation (generation.py), on the same batches
reference's layout    the same beam search in 8 rows at a time, in the order of the file, 5 beams
..., bfloat16         scoring and the reference's layout with matrix products in bfloat16, where the
                      processor has it; on how many rows scoring's answer is another one is printed

  python scripts/benchmarks/answers.py --data_dir GLUE [--tasks sst2 rte mnli] [--rows 200]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from timing import report, side_by_side

from pem_composition import offline
from pem_composition.evaluation.attached import bfloat16_note
from pem_composition.evaluation.decoding import (
    ANSWERS,
    CONSTRAINED,
    SCORING,
)
from pem_composition.evaluation.evaluator import Outputs
from pem_composition.evaluation.generation import constrained
from pem_composition.evaluation.models import load_seq2seq
from pem_composition.evaluation.padded import Batch, collect
from pem_composition.evaluation.precision import reduced
from pem_composition.evaluation.prompted_rows import PromptedEvaluator
from pem_composition.objectives.answers import Answers
from pem_composition.tasks.data import RowFiles, load_task

REFERENCE_ROWS, REFERENCE_BEAMS = 8, 5
ENCODER, REFERENCE = "encoder alone", "reference's layout"
REDUCED, REFERENCE_REDUCED = f"{SCORING}, bfloat16", f"{REFERENCE}, bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True, help="folder of GLUE tasks; dev is read")
    parser.add_argument("--model", default="flan-t5-small", help="a text-to-text model")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "rte", "mnli"])
    parser.add_argument("--rows", type=int, default=200, help="at most so many rows per task")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, _ = load_seq2seq(str(offline.resolve(args.model)))
    model.to(device)
    for name in args.tasks:
        case = Case(model, tokenizer, name, args.data_dir, args.rows)
        seconds = side_by_side(case.candidates(), args.runs)
        print(f"\n{args.model}, {name}, {case.rows} rows, {device}\n")
        report(seconds, base=SCORING)
        rates = {n: case.rows / statistics.median(s) for n, s in seconds.items()}
        print("\n" + ", ".join(f"{n} {rate:.1f} rows/s" for n, rate in rates.items()))
        for ours in (SCORING, REDUCED):
            for theirs in (CONSTRAINED, REFERENCE, REFERENCE_REDUCED):
                if {ours, theirs} <= set(rates):
                    print(f"{ours} beside {theirs}: {rates[ours] / rates[theirs]:.2f} x")
        if REDUCED in rates:
            print(f"answers that bfloat16 changes: {case.changed()} of {case.rows}")


class Case:
    """One task's rows, prepared before the clock starts."""

    def __init__(
        self, model: torch.nn.Module, tokenizer: object, name: str, folder: str, rows: int
    ):
        self.model = model
        self.device = device = next(model.parameters()).device
        data = load_task(
            name, RowFiles(data_dir=folder, splits=("validation",), max_eval_samples=rows)
        )
        self.evaluators: dict[str, PromptedEvaluator] = {
            how: Answers(found=how).evaluator(
                data.task, data.validation, tokenizer, model.config, device=device
            )
            for how in ANSWERS
        }
        self.rows = self.evaluators[SCORING].size
        prompt = self.evaluators[SCORING].prompt
        sources = [prompt.source(data.task, example) for example in data.validation]
        self.reference = in_file_order(tokenizer, sources, device)

    def candidates(self) -> dict[str, Callable[[], object]]:
        """Each way as a call that answers every row once."""

        def by(evaluator: PromptedEvaluator) -> Callable[[], object]:
            return lambda: evaluator.predict(self.model)

        evaluator = self.evaluators[SCORING]
        ways = {how: by(evaluator) for how, evaluator in self.evaluators.items()} | {
            REFERENCE: self.by_reference,
            ENCODER: lambda: collect(self.model, evaluator.batches, encode),
        }
        if self.has_bfloat16:
            ways |= {REDUCED: self.reduced, REFERENCE_REDUCED: lambda: self.by_reference(bf16=True)}
        return ways

    @property
    def has_bfloat16(self) -> bool:
        """True where bfloat16 is no emulation."""
        return bfloat16_note(self.device.type) is None

    def by_reference(self, *, bf16: bool = False) -> None:
        """Constrained beam search in the reference's layout."""
        with reduced(self.model, bf16):
            collect(self.model, self.reference, self.search)

    def reduced(self) -> Outputs:
        """Scoring with matrix products in bfloat16."""
        with reduced(self.model):
            return self.evaluators[SCORING].predict(self.model)

    def changed(self) -> int:
        """Rows on which scoring in bfloat16 prefers another answer."""
        evaluator = self.evaluators[SCORING]
        exact, reduced = evaluator.predict(self.model), self.reduced()
        return int((evaluator.predictions(exact) != evaluator.predictions(reduced)).sum())

    def search(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The reference's number of beams."""
        evaluator = self.evaluators[CONSTRAINED]
        return constrained(
            model, inputs, evaluator.answers, evaluator.writing, beams=REFERENCE_BEAMS
        ).log_p[:, None]


def encode(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The encoder's states, of which one number per row is kept."""
    states = model.get_encoder()(**inputs).last_hidden_state  # type: ignore[operator]
    return states[:, 0, :1]


def in_file_order(
    tokenizer: object, sources: Sequence[str], device: torch.device
) -> tuple[Batch, ...]:
    """Batches as a collator makes them: neighbours, padded to the longest of them."""
    made = []
    for first in range(0, len(sources), REFERENCE_ROWS):
        texts = list(sources[first : first + REFERENCE_ROWS])
        encoded = tokenizer(  # type: ignore[operator]
            texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
        ).to(device)
        names = ("input_ids", "attention_mask")
        rows = list(range(first, first + len(texts)))
        made.append(Batch(rows, {name: encoded[name] for name in names}))
    return tuple(made)


if __name__ == "__main__":
    main()
