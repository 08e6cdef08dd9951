"""Readers: every format gives the same rows; a mistake is reported with its line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pandas
import pytest

from pem_composition.errors import DataError
from pem_composition.tasks.tables import read_table

ROWS = [
    {"sentence1": 'He said "hi", twice.', "sentence2": "plain", "label": "entailment"},
    {"sentence1": "caf\u00e9 \u2028 line", "sentence2": "", "label": "not_entailment"},
]


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    kind = path.name.split(".")[1]
    if kind == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind == "json":
        text = json.dumps(rows, indent=1)
    elif kind == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
        return path
    else:
        text = pandas.DataFrame(rows).to_csv(index=False, sep="\t" if kind == "tsv" else ",")
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "a.tsv.gz"],
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    assert read_table(write(tmp_path / name)).rows == ROWS


def test_gzip_is_told_by_content_not_by_extension(tmp_path):
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(write(tmp_path / "b.jsonl.gz").read_bytes())
    assert read_table(plain).rows == ROWS


def test_json_lines_under_the_extension_json(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    assert [r["label"] for r in read_table(path).rows] == [0, 1]


def test_a_glue_tsv_has_no_quoting(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('sentence\tlabel\n"Hello, he said.\t1\n"Yes" or " no\t0\n')
    assert [r["sentence"] for r in read_table(path).rows] == ['"Hello, he said.', '"Yes" or " no']


def test_cola_as_distributed_has_no_header(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThey rode the.\n")
    first, second = read_table(path).rows
    assert first == {"source": "gj04", "label": "1", "star": "", "sentence": "The sailors rode."}
    assert second["label"] == "0"


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n\n')
    table = read_table(path)
    assert [r["text"] for r in table.rows] == ["a", "b"]
    assert list(table.lines) == [1, 3]


BAD_LINES = {
    "typo": ('{"text": "a", "label": 1}\n{"text": "b", "lable": 1}\n', "line 2", "no 'label'"),
    "extra": ('{"text": "a"}\n{"text": "b", "label": 1}\n', "line 2", "the unknown 'label'"),
    "cut": ('{"text": "a"}\n{"text": "b\n', "line 2", "not a JSON object"),
    "twice": ('{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2", "'text' appears twice"),
    "nan": ('{"label": 1}\n{"label": NaN}\n', "line 2", "NaN is not a JSON number"),
    "list": ('{"label": 1}\n[1]\n', "line 2", "not a JSON object"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, case):
    text, line, what = BAD_LINES[case]
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_table(path)
    assert str(path) in str(error.value)
    assert line in str(error.value)
    assert what in str(error.value)


def test_a_csv_row_with_a_field_too_many_is_named_by_its_first_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",1\nb,0,extra\n')
    with pytest.raises(DataError, match=r"line 4: wrong number of fields; found 3, expected 2"):
        read_table(path)


def test_a_quoted_newline_stays_in_its_field(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["two\nlines", "1"]])
    assert read_table(path).rows == [{"text": "two\nlines", "label": "1"}]


BAD_FILES = {
    "empty.jsonl": (b"", "empty"),
    "blank.csv": (b"\n\n", "empty"),
    "header.csv": (b"text,label\n", "no rows"),
    "none.json": (b"[]", "no rows"),
    "scalars.json": (b"[1, 2]", "item 1: not an object"),
    "twice.csv": (b"text,text\na,b\n", "'text' twice"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 50)[:-20], "broken gzip file"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2: not UTF-8"),
    "bad.parquet": (b"PAR1 and nothing more", "not a readable Parquet file"),
    "notes.xyz": (b"hello", "unknown format"),
    "quotes.csv": (b'text,label\n"a"b,1\n', "line 2: not CSV"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name):
    data, what = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        read_table(tmp_path / name)
    assert what in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="a directory"):
        read_table(tmp_path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("content", ["\ufeff", "\ufeff\n\n"])
def test_a_file_of_a_mark_and_blank_lines_is_empty(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"is empty"):
        read_table(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_is_nested_too_deeply_is_refused(tmp_path, name):
    deep = "[" * 100_000
    (tmp_path / name).write_text(deep if name == "a.json" else f'{{"text": {deep}')
    with pytest.raises(DataError, match=r"not a JSON"):
        read_table(tmp_path / name)


def test_a_cell_may_hold_a_long_document(tmp_path):
    long = "word " * 60_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}",1\n')
    assert read_table(tmp_path / "a.csv").rows == [{"text": long, "label": "1"}]


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_packed_files_give_the_rows_of_the_plain_one(tmp_path, kind):
    data = write(tmp_path / f"a.{kind}").read_bytes()
    for suffix, pack in PACK.items():
        (tmp_path / f"a.{kind}.{suffix}").write_bytes(pack(data))
        assert read_table(tmp_path / f"a.{kind}.{suffix}").rows == ROWS
    extra = {"__MACOSX/._a": b"\0", "folder/": b""}
    assert read_table(zipped(tmp_path / "b.zip", {f"folder/a.{kind}": data, **extra})).rows == ROWS
    assert read_table(zipped(tmp_path / f"a.{kind}.zip", {"a": data})).rows == ROWS


def test_an_archive_of_several_files_or_none_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"not one file in the archive; found a.csv, b.csv"):
        read_table(zipped(tmp_path / "a.zip", {"a.csv": b"x", "b.csv": b"y"}))
    with pytest.raises(DataError, match=r"found none, expected one file"):
        read_table(zipped(tmp_path / "b.zip", {}))


@pytest.mark.parametrize("suffix", PACK)
def test_a_packed_file_that_is_cut_or_damaged_is_refused(tmp_path, suffix):
    packed = PACK[suffix](write(tmp_path / "a.csv").read_bytes() * 50)
    path = tmp_path / f"b.csv.{suffix}"
    for broken in (packed[:-9], packed[:20] + b"\xff" * 9 + packed[29:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"broken (gzip|bzip2|xz) file"):
            read_table(path)


QUOTINGS = {"all": csv.QUOTE_ALL, "non-numeric": csv.QUOTE_NONNUMERIC, "minimal": csv.QUOTE_MINIMAL}


@pytest.mark.parametrize("quoting", QUOTINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_tsv_that_was_written_with_quotes_is_read_with_them(tmp_path, quoting, end, mark):
    """As pandas reads it."""
    texts = ["plain", 'He said "no".', "a\ttab", "two\nlines", '"', ""]
    frame = pandas.DataFrame({"sentence": texts, "label": range(6)})
    text = frame.to_csv(index=False, sep="\t", quoting=QUOTINGS[quoting], lineterminator=end)
    path = tmp_path / "a.tsv"
    path.write_bytes((mark + text).encode())
    oracle = pandas.read_csv(path, sep="\t", keep_default_na=False, dtype=str)
    assert read_table(path).rows == oracle.to_dict("records")
    assert [row["sentence"] for row in read_table(path).rows] == texts


@pytest.mark.parametrize("texts", [["a\ttab", "plain"], ["two\nlines", "plain"]])
def test_a_tsv_whose_lines_are_uneven_as_they_stand_is_quoted(tmp_path, texts):
    path = tmp_path / "a.tsv"
    frame = pandas.DataFrame({"sentence": texts, "label": ["0", "1"]})
    frame.to_csv(path, index=False, sep="\t")
    assert [row["sentence"] for row in read_table(path).rows] == texts


GLUE_LINES = [
    ['"Hello, he said.', "1", '"Yes"', "0"],
    ['"Hello', "1", 'world"', "0"],  # with quotes these two rows would be one
    ['"""', "1", 'it""s', "0"],
]


@pytest.mark.parametrize("cells", GLUE_LINES)
def test_quotes_of_a_glue_tsv_are_letters(tmp_path, cells):
    """As pandas reads it with QUOTE_NONE."""
    path = tmp_path / "a.tsv"
    path.write_text("sentence\tlabel\n{}\t{}\n{}\t{}\n".format(*cells))
    oracle = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str)
    assert read_table(path).rows == oracle.to_dict("records")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_mark_windows_line_ends_and_empty_lines_change_nothing(tmp_path, name):
    path = write(tmp_path / name)
    lines = path.read_bytes().replace(b"\n", b"\r\n\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + lines + b"\r\n")
    assert read_table(path).rows == ROWS


@pytest.mark.parametrize(
    "odd", ['{"text": "b", "lable": 1}', '{"text": "b"}', '{"text": "b", "label": 1, "x": 2}']
)
def test_json_lines_with_differing_keys_are_named_by_their_line(tmp_path, odd):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 0}\n\n' + odd + "\n")
    with pytest.raises(DataError, match=r"line 3: columns differ from the first row's"):
        read_table(path)
