"""Documents become one stream of tokens in their order, cut into blocks of one size."""

from __future__ import annotations

import json
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pem_composition.errors import DataError
from pem_composition.tasks.data import RowFiles
from pem_composition.tasks.document_rows import LANGUAGE, load_documents, next_blocks

tokens = st.lists(st.lists(st.integers(3, 99), max_size=30), max_size=20)


@given(tokens, st.integers(1, 12))
def test_blocks_are_neighbours_of_the_stream_and_only_the_rest_is_left_out(documents, size):
    stream = list(chain.from_iterable(documents))
    if len(stream) < 2 * size:
        with pytest.raises(DataError, match="fewer than two blocks"):
            next_blocks(documents, size)
        return
    pairs = next_blocks(documents, size)
    assert len(pairs) == len(stream) // size - 1
    for i, (source, target) in enumerate(pairs):
        assert source == stream[i * size : (i + 1) * size]
        assert target == stream[(i + 1) * size : (i + 2) * size]
    read = [token for source, _ in pairs for token in source] + pairs[-1][1]
    assert len(stream) - len(read) == len(stream) % size
    assert read == stream[: len(read)]


def test_too_few_blocks_name_the_numbers():
    with pytest.raises(DataError, match="--block_size") as error:
        next_blocks([[5] * 7], 4)
    assert "found 7 tokens, expected at least 8; lower --block_size" in str(error.value)


def rows_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_keep_their_order_and_lose_their_labels(tmp_path):
    texts = ["b", " ", "a", "", "c", "\n"]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    data = load_documents(None, RowFiles(validation_file=rows_file(tmp_path / "dev.jsonl", *rows)))
    assert data.task == LANGUAGE and set(data.splits) == {"validation"}
    assert [(e.text, e.text_pair, e.label, e.row_id) for e in data.validation] == [
        ("b", None, None, 0), ("a", None, None, 2), ("c", None, None, 4),
    ]  # fmt: skip


def test_limits_take_the_first_documents_of_their_split(tmp_path):
    rows = [{"text": f"t{i}"} for i in range(9)]
    files = {f"{n}_file": rows_file(tmp_path / f"{n}.jsonl", *rows) for n in ("train", "test")}
    data = load_documents(
        None, RowFiles(**files, splits=("train", "test"), max_train_samples=4, max_eval_samples=2)
    )
    assert [e.text for e in data.train] == ["t0", "t1", "t2", "t3"]
    assert [e.text for e in data.test] == ["t0", "t1"]


def test_a_known_task_brings_its_column_and_of_pairs_the_first_text(tmp_path):
    rows = [{"sentence1": "one", "sentence2": "two", "label": 0}]
    path = rows_file(tmp_path / "dev.jsonl", *rows)
    for name in ("rte", None):
        data = load_documents(name, RowFiles(validation_file=path), unnamed=None)
        assert [e.text for e in data.validation] == ["one"]


def test_real_reviews_need_no_labels(shared):
    folder = shared / "data" / "sentiment" / "mr"
    data = load_documents(
        None, RowFiles(data_dir=folder, splits=("validation",), max_eval_samples=3)
    )
    assert len(data.validation) == 3
    assert all(e.label is None and e.text.strip() for e in data.validation)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": " "}, {"text": ""}], "no text in any row"),
        ([{"label": 1, "stars": 2.0}], "no text column"),
        ([{"text": "fine"}, {"text": 3}], "column 'text' is not text; found 3"),
    ],
)
def test_files_without_text_are_refused(tmp_path, rows, words):
    with pytest.raises(DataError) as error:
        load_documents(None, RowFiles(validation_file=rows_file(tmp_path / "dev.jsonl", *rows)))
    assert words in str(error.value) and "dev.jsonl" in str(error.value)


def test_no_file_at_all_is_refused():
    with pytest.raises(DataError, match="no task and no file"):
        load_documents(None, RowFiles(), unnamed=None)
