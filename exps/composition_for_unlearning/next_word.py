"""A task of the lm-evaluation-harness from a file of texts: guess the next word.

    python next_word.py --text_file stories.jsonl.gz --rows 400 --output_dir outputs/tasks

It asks as LAMBADA does (arXiv 1606.06031): the model reads the first words of a text. The word
that follows is scored by its log-likelihood: the accuracy of the greedy guess, and the perplexity.
Run it with ``--harness_tasks next_word --harness_include OUTPUT_DIR``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pem_composition.errors import PEMError
from pem_composition.tasks.data import texts_of
from pem_composition.tasks.tables import read_table

TASK = """\
task: next_word
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
test_split: validation
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code; 2 and one line where the file cannot be read or has too few texts."""
    parser = argparse.ArgumentParser("next_word.py", allow_abbrev=False)
    parser.add_argument("--text_file", type=Path, required=True, help="table with a text per row")
    parser.add_argument("--words", type=int, default=80, help="words that are read (default: 80)")
    parser.add_argument("--rows", type=int, default=400, help="rows of the task (default: 400)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the task")
    given = parser.parse_args(argv)
    try:
        texts = texts_of(read_table(given.text_file), None)
    except PEMError as error:
        parser.error(str(error))
    read = [text.split() for text in texts]
    # A word beside punctuation has several spellings; the task asks for bare ones.
    long = [words for words in read if len(words) > given.words and words[given.words].isalpha()]
    if len(long) < given.rows:
        parser.error(
            f"--text_file: {given.text_file}: {len(long)} texts go on after {given.words} words"
            f" with a bare word; expected {given.rows} (--rows); take more texts or fewer rows"
        )
    rows = given.output_dir.resolve() / "next_word.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("w", encoding="utf-8") as out:
        for words in long[: given.rows]:
            row = {"context": " ".join(words[: given.words]), "word": words[given.words]}
            out.write(f"{json.dumps(row)}\n")
    task = TASK.format(rows=json.dumps(str(rows)))
    rows.with_suffix(".yaml").write_text(task, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
