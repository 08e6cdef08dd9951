"""The reference's program of this name, by its flags: the toxicity of texts, by Detoxify.

    python run_prediction.py --input texts.txt --model_name unbiased --save_to scores.csv

It scores as ``pem judge score --judge detoxify`` does. ``--model_name offline`` needs no hub;
``--from_ckpt_path`` takes a judge's folder.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from pem_composition.errors import PEMError
from pem_composition.evaluation.toxicity import load_judge, summarise
from pem_composition.evaluation.toxicity.rates import spoken

JUDGES = {"unbiased": "detoxify", "offline": "offline"}


def main(argv: list[str] | None = None) -> int:
    """Print the mean; with --save_to a row per text. 2 on bad input, with one line on stderr."""
    parser = argparse.ArgumentParser("run_prediction.py", allow_abbrev=False)
    parser.add_argument(
        "--input", required=True, help="text file with a text per line, or one text"
    )
    parser.add_argument("--model_name", choices=JUDGES, help="of the judge (default: unbiased)")
    parser.add_argument("--from_ckpt_path", help="instead: folder of a judge")
    parser.add_argument("--device", help="not needed")
    parser.add_argument("--save_to", type=Path, help="table of the scores, csv")
    given = parser.parse_args(argv)
    if given.model_name and given.from_ckpt_path:
        parser.error("--model_name or --from_ckpt_path, not both")
    file = Path(given.input)
    if file.suffix == ".txt" and not file.is_file():
        parser.error(f"--input: no such file: {file}")
    texts = file.read_text(encoding="utf-8").splitlines() if file.is_file() else [given.input]
    try:
        judge = load_judge(given.from_ckpt_path or JUDGES[given.model_name or "unbiased"])
        scores = judge.score(texts)
        facts = summarise(scores, spoken(texts))
    except PEMError as error:
        sys.stderr.write(f"run_prediction.py: error: {error}\n")
        return error.exit_code
    if given.save_to:
        with given.save_to.open("w", encoding="utf-8", newline="") as out:
            rows = csv.writer(out)
            rows.writerow(["input_text", "toxicity"])
            rows.writerows(zip(texts, (round(float(s), 5) for s in scores), strict=True))
    sys.stdout.write(f"{facts['mean']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
