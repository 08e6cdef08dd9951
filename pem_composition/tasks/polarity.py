"""Reviews as text for a language model of their domain: block i is read, block i + 1 is written.

Documents end with the tokenizer's end token, are joined in the order of the file and cut into
blocks of equal size; the rest that fills no block is left out. n blocks give n - 1 pairs. (The
reference joins per 1,000 rows and drops a rest each time; here there is one rest.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain, pairwise
from pathlib import Path

from pem_composition.errors import DataError
from pem_composition.tasks import data as rows
from pem_composition.tasks.glue import Reading, Task, get_task

LANGUAGE = Task(
    "language", ("text", None), (), metrics=("loss", "perplexity"), primary="loss"
)  # what a domain's documents are learned as

Block = list[int]


def load_documents(
    task_name: str | None = None,
    *,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    data_dir: str | Path | None = None,
    splits: Collection[str] = (rows.TRAIN, rows.VALIDATION),
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    reading: Reading | None = None,
) -> rows.TaskData:
    """The texts of a domain without their labels, in the order of the files; blank ones left out.

    Where rows have two texts, the first is taken, unless ``reading`` names the column. Limits take
    the first rows, as documents in their order make the blocks.

    Raises:
        DataError: no such file or task, a table without text, or no text in it.
    """
    task = get_task(task_name) if task_name is not None else None
    given = {rows.TRAIN: train_file, rows.VALIDATION: validation_file, rows.TEST: test_file}
    files = {split: Path(path) for split, path in given.items() if path}
    tables = rows.read_tables(task, files, data_dir, splits)
    limits = {rows.TRAIN: max_train_samples}
    out: dict[str, tuple[rows.Example, ...]] = {}
    for split in [s for s in tables if s in splits]:
        texts = rows.texts_of(tables[split], task, reading)
        kept = [(i, text) for i, text in enumerate(texts) if text.strip()]
        if not kept:
            raise DataError.build(tables[split].name, "no text in any row")
        kept = kept[: limits.get(split, max_eval_samples)]
        out[split] = tuple(rows.Example(text, None, None, i) for i, text in kept)
    return rows.TaskData(LANGUAGE, out, {split: tables[split].name for split in out})


def next_blocks(documents: Sequence[Sequence[int]], block_size: int) -> list[tuple[Block, Block]]:
    """Pairs of neighbouring blocks of the joined documents (token numbers, end tokens included).

    Raises:
        DataError: fewer than two blocks.
    """
    stream = list(chain.from_iterable(documents))
    count = len(stream) // block_size
    if count < 2:
        raise DataError.build(
            "--block_size", "the documents fill fewer than two blocks",
            found=f"{len(stream)} tokens", expected=f"at least {2 * block_size}",
            do="lower --block_size or give more text",
        )  # fmt: skip
    blocks = [stream[i * block_size : (i + 1) * block_size] for i in range(count)]
    return list(pairwise(blocks))
