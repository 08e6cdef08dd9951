"""Tables from files: JSON lines, JSON lists, CSV, TSV and Parquet, packed or not.

Every row must have the same columns. A mistake is reported with its line: a misspelled key in one
line must not become an empty value in a column nobody asked for.

Packing (gzip, bzip2, xz, a zip archive of one file) is told by content, the format by extension.

A TSV file is read as it stands, without quoting, as GLUE's are. It is read with quotes where its
header is quoted, or where each quote belongs to a field in quotes and there is a sign that they are
meant so: a doubled quote inside, or lines that as they stand have different numbers of fields.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from pem_composition.errors import DataError, install
from pem_composition.safe_files import refuse_constant, unique_keys
from pem_composition.tasks.glue import WrittenFloat

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
PARQUET_MAGIC, ZIP_MAGIC = b"PAR1", b"PK"
PACKERS: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"\xfd7zXZ\x00": ("xz", lzma.decompress),
}
PACKED = ("gz", "bz2", "xz", "zip")  # their extensions
# The distributed CoLA files have no header; nothing else in GLUE lacks one.
COLA_COLUMNS = ("source", "label", "star", "sentence")
QUOTED = re.compile(r'(?:^|(?<=[\t\n]))"((?:[^"]|"")*)"(?=[\t\r\n]|$)')  # a whole field in quotes

# Files that the paper's published programs name, and how one comes by them.
PUBLISHED = {
    r".+-(all|1k)-[01]\.json": "pem split writes such halves: half-0.jsonl and half-1.jsonl",
    r"(toxic_seed_v1_[nt]|toxic_datasets|seed_v0)\.json": "docs/reference_code.md says where it is "
    "to be had, and how to do without",
}


@dataclass(frozen=True)
class Table:
    """Rows of one file (or of one hub split) and the place of each in it."""

    name: str
    rows: list[dict[str, Any]]
    lines: Sequence[int]
    unit: str = "line"

    def where(self, index: int) -> str:
        """``file, line 12`` of a row, for messages."""
        return f"{self.name}, {self.unit} {self.lines[index]}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names in the order of the file."""
        return tuple(self.rows[0])

    @property
    def shown(self) -> str:
        """The same for messages: a name with blanks around it, or of nothing else, in quotes."""
        return ", ".join(c if c and c == c.strip() else repr(c) for c in self.columns)

    def column(self, names: Sequence[str], what: str) -> str:
        """The first of these columns that there is.

        Raises:
            DataError: none of them; the table holds no ``what``.
        """
        found = next((name for name in names if name in self.columns), None)
        if found is None:
            raise DataError.build(
                self.name, f"no {what}", found=self.shown,
                expected="a column named " + " or ".join(names),
            )  # fmt: skip
        return found


def read_table(path: str | Path) -> Table:
    """All rows of a file with their line numbers.

    Raises:
        DataError: no such file, unknown format, several files in one, truncated or not UTF-8,
            malformed line, duplicate key, rows with different columns, or no rows at all.
    """
    path = _found(Path(path), "rows")
    name, data = _unpacked(path)
    kind = _format(path, name, data)
    if not data.strip():
        raise DataError.build(path, "the file is empty", expected="at least one row")
    if kind == "parquet":
        table = _parquet(path, data)
    else:
        text = _decoded(path, data)
        table = _json_table(path, text) if kind in ("jsonl", "json") else _csv(path, text, kind)
    if not table.rows:
        raise DataError.build(path, "no rows", expected="at least one row")
    _check_columns(table)
    return table


JSON_INTEGER = re.compile(r"0|-?[1-9]\d*", re.ASCII)
JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)


def written(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON, its numbers as the file that it comes from writes them."""
    cells = (f"{json.dumps(k, ensure_ascii=False)}: {_written(v)}" for k, v in row.items())
    return "{" + ", ".join(cells) + "}"


def _written(value: Any) -> str:
    if isinstance(value, WrittenFloat):
        return value.text
    return json.dumps(value, ensure_ascii=False, default=str)


def read_lines(path: str | Path) -> list[str]:
    """Lines of a plain text file, packed or not, without their line breaks.

    Raises:
        DataError: no such file, or not UTF-8.
    """
    text = _decoded(Path(path), _unpacked(_found(Path(path), "lines"))[1])
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n")


def _found(path: Path, what: str) -> Path:
    if not path.is_file():
        found = "a directory" if path.is_dir() else "no such file"
        remedy = next((do for name, do in PUBLISHED.items() if re.fullmatch(name, path.name)), None)
        raise DataError.build(
            path, f"cannot read {what}", found=found, expected="a data file", do=remedy
        )
    return path


def _unpacked(path: Path) -> tuple[Path, bytes]:
    """Name and content of the file, or of the one file that a zip archive holds."""
    data = path.read_bytes()
    if data.startswith(ZIP_MAGIC) and zipfile.is_zipfile(io.BytesIO(data)):
        return _only_member(path, data)
    for magic, (kind, unpack) in PACKERS.items():
        if data.startswith(magic):
            try:
                return path, unpack(data)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise _broken(path, kind, error) from None
    return path, data


def _only_member(path: Path, data: bytes) -> tuple[Path, bytes]:
    """Name and content of the only file in an archive; what macOS adds of its own is no file.

    Raises:
        DataError: several files, none, or one that cannot be read.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
        members = [m for m in members if not m.filename.startswith("__MACOSX/")]
        if len(members) != 1:
            raise DataError.build(
                path, "not one file in the archive",
                found=", ".join(m.filename for m in members[:5]) or "none", expected="one file",
                do="unpack it and name the file",
            )  # fmt: skip
        try:
            return Path(members[0].filename), archive.read(members[0])
        except (
            OSError,
            RuntimeError,
            NotImplementedError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise _broken(path, "zip", error) from None


def _broken(path: Path, kind: str, error: Exception) -> DataError:
    return DataError.build(path, f"broken {kind} file ({error})", do="copy or download it again")


def _format(path: Path, name: Path, data: bytes) -> str:
    """By content for Parquet, by extension for the rest, else by the first character."""
    if data.startswith(PARQUET_MAGIC):
        return "parquet"
    for suffix in reversed([s[1:].lower() for s in (*path.suffixes, *name.suffixes)]):
        if suffix in FORMATS:
            return suffix
        if suffix == "ndjson":
            return "jsonl"
    if data.lstrip()[:1] in (b"{", b"["):
        return "json"
    raise DataError.build(
        path, "unknown format", found=path.suffix or "no extension", expected=", ".join(FORMATS)
    )


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError.build(
            f"{path}, line {line}", "not UTF-8", found=f"byte 0x{data[error.start]:02x}",
            do="convert the file, for example with iconv",
        ) from None  # fmt: skip


def _json_table(path: Path, text: str) -> Table:
    """A list of objects, or one object per line; the extension does not decide which."""
    if text.lstrip().startswith("["):
        return _json_list(path, text)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    # Not splitlines(): it would also cut at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_json_row(f"{path}, line {number}", line))
            lines.append(number)
    return Table(str(path), rows, lines)


def _json_list(path: Path, text: str) -> Table:
    try:
        rows = json.loads(text, **JSON_RULES)
    except (ValueError, RecursionError) as error:
        raise DataError.build(path, f"not a JSON list: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError.build(
                f"{path}, item {number}", "not an object", found=type(row).__name__,
                expected="a list of objects",
            )  # fmt: skip
        _check_characters(f"{path}, item {number}", row)
    return Table(str(path), rows, range(1, len(rows) + 1), "item")


def _json_row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, **JSON_RULES)
    except (ValueError, RecursionError) as error:
        raise DataError.build(where, f"not a JSON object: {error}", found=_short(line)) from None
    if not isinstance(row, dict):
        raise DataError.build(where, "not a JSON object", found=_short(line))
    if "\\u" in line:
        _check_characters(where, row)
    return row


def _check_characters(where: str, row: dict[str, Any]) -> None:
    """Refuse half of a surrogate pair, as a text has that was cut in UTF-16: it is no character, so
    no tokenizer takes it and no file can hold it.
    """
    try:
        written(row).encode()
    except UnicodeEncodeError as error:
        raise DataError.build(
            where, "half a surrogate pair", found=f"\\u{ord(error.object[error.start]):04x}",
            expected="whole characters", do="take it out of the text",
        ) from None  # fmt: skip


JSON_RULES: dict[str, Any] = {
    "object_pairs_hook": unique_keys,
    "parse_constant": refuse_constant,
    "parse_float": WrittenFloat,
}


def _csv(path: Path, text: str, kind: str) -> Table:
    """Comma separated with quotes, or tab separated with or without."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a cell may hold a document
    if kind == "csv":
        records, lines = _records(path, text, kind, delimiter=",")
    else:
        quoting = csv.QUOTE_MINIMAL if _tsv_is_quoted(path, text) else csv.QUOTE_NONE
        records, lines = _records(path, text, kind, delimiter="\t", quoting=quoting)
    if not records:
        raise DataError.build(path, "the file is empty", expected="a header and rows")
    header = list(COLA_COLUMNS) if _is_cola(records) else records[0]
    first = 0 if header == list(COLA_COLUMNS) and records[0] != header else 1
    _check_header(path, header)
    for record, line in zip(records[first:], lines[first:], strict=True):
        if len(record) != len(header):
            raise DataError.build(
                f"{path}, line {line}", "wrong number of fields", found=len(record),
                expected=f"{len(header)} ({', '.join(header)})",
            )  # fmt: skip
    rows = [dict(zip(header, record, strict=True)) for record in records[first:]]
    return Table(str(path), rows, lines[first:])


def _records(path: Path, text: str, kind: str, **options: Any) -> tuple[list[list[str]], list[int]]:
    """Records and the line each begins on; empty lines are none.

    Raises:
        DataError: a quote that is not closed, or text after one that is.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **options)
    records: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        for record in reader:
            if record:
                records.append(record)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError.build(f"{path}, line {start}", f"not {kind.upper()}: {error}") from None
    return records, lines


def _tsv_is_quoted(path: Path, text: str) -> bool:
    """Whether a TSV file is read with quotes; the rule stands at the top of this file."""
    if '"' not in text:
        return False
    header = text.partition("\n")[0].rstrip("\r").split("\t")
    if all(len(name) > 1 and name[0] == name[-1] == '"' for name in header):
        return True
    if '"' in QUOTED.sub("", text):
        return False  # a quote outside such fields is a letter of the text
    if any('""' in field for field in QUOTED.findall(text)):
        return True
    plain, _ = _records(path, text, "tsv", delimiter="\t", quoting=csv.QUOTE_NONE)
    return len({len(record) for record in plain}) > 1


def _is_cola(records: list[list[str]]) -> bool:
    first = records[0]
    return len(first) == 4 and first[1] in ("0", "1") and first[2] in ("", "*")


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice or "" in header:
        raise DataError.build(
            f"{path}, line 1", "not a header", expected="one distinct name per column",
            found=f"'{twice[0]}' twice" if twice else "an unnamed column",
            do="" if twice else "name it, or write the table without an index",
        )  # fmt: skip


def _parquet(path: Path, data: bytes) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError.build(path, "Parquet needs pyarrow", do=install("pyarrow")) from None
    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError.build(path, f"not a readable Parquet file ({error})") from None
    rows = [{name: _cell(value) for name, value in row.items()} for row in rows]
    return Table(str(path), rows, range(1, len(rows) + 1), "row")


def _cell(value: Any) -> Any:
    """A cell of Parquet as JSON lines would have it, so that a split of the table reads the same:
    decimals are numbers, bytes that are text (as Spark writes it) are text, NaN is no value.
    """
    if isinstance(value, dict):
        return {name: _cell(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_cell(part) for part in value]
    if isinstance(value, Decimal):
        return WrittenFloat(str(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else WrittenFloat("1e999" if value > 0 else "-1e999")
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value


def _check_columns(table: Table) -> None:
    """Every row has the columns of the first."""
    expected = table.rows[0].keys()
    for index, row in enumerate(table.rows):
        if row.keys() != expected:
            missing, extra = _names(expected - row.keys()), _names(row.keys() - expected)
            found = " and ".join(
                [f"no {missing}"] * bool(missing) + [f"the unknown {extra}"] * bool(extra)
            )
            raise DataError.build(
                table.where(index), "columns differ from the first row's", found=found,
                expected=", ".join(expected), do="correct the line",
            )  # fmt: skip


def _names(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in sorted(keys))


def _short(text: str, limit: int = 60) -> str:
    text = text.strip()
    return repr(text if len(text) <= limit else text[:limit] + "...")
