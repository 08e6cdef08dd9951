"""Tables of labelled rows that no program can use."""

from __future__ import annotations

import bz2
import zipfile
from collections.abc import Callable
from pathlib import Path

from faults.case import Case

SPLIT = ("split", "--train_file", "rows.csv", "--output_dir", "out")
LINES = (*SPLIT[:2], "rows.jsonl", *SPLIT[3:])


def table(*lines: str, name: str = "rows.csv") -> Callable[[Path], object]:
    """A file of these lines."""
    return lambda here: (here / name).write_text("\n".join(lines) + "\n")


def archive(here: Path) -> None:
    with zipfile.ZipFile(here / "rows.csv", "w") as file:
        file.writestr("train.csv", "text,label\n")
        file.writestr("dev.csv", "text,label\n")


TWO = table("text,mood,label", "a,bad,0", "b,good,1")
CASES = (
    Case("Y01", "a list as a label",
         "rows.jsonl, line 2: several labels in one row (multi-label classification); found [0, "
         "1], expected one class or one score per row",
         table('{"text": "a", "label": 0}', '{"text": "b", "label": [0, 1]}', name="rows.jsonl"),
         run=(LINES,)),
    Case("Y02", "words among scores",
         "rows.csv, line 3: labels are scores in some rows and words in others; found 'n/a', "
         "expected a number; correct the row, or add --do_regression false for classes",
         table("text,label", "a,0.5", "b,n/a"), run=(SPLIT,)),
    Case("Y03", "indices beside the words they stand for",
         "rows.csv, line 3: labels are words in some rows and numbers in others; found 'no' in "
         "line 2 and '1' in line 3, expected one convention in a file",
         table("text,label", "a,no", "b,1", "c,yes", "d,0"), run=(SPLIT,)),
    Case("Y04", "one class",
         "rows.csv: not a classification task; found labels a, expected at least two different "
         "labels; name all classes: --labels A B",
         table("text,label", "x,a", "y,a"), run=(SPLIT,)),
    Case("Y05", "a column that is not there",
         "--label_column_name mod: no such column in rows.csv; found text, mood, label, expected "
         "the name of a column",
         TWO, run=((*SPLIT, "--label_column_name", "mod"),)),
    Case("Y06", "the label as text",
         "--label_column_name: is also a column of text; found mood, expected another column",
         TWO, run=((*SPLIT, "--label_column_name", "mood", "--text_column_names", "mood"),)),
    Case("Y07", "classes of a regression",
         "--labels: contradicts --do_regression true; give one of the two",
         TWO, run=((*SPLIT, "--labels", "0", "1", "--do_regression"),)),
    Case("Y08", "a class that was not named",
         "rows.csv, line 3: unknown label; found 'good', expected one of bad (0), fine (1); "
         "if the file has other classes, name them all: --labels A B",
         TWO, run=((*SPLIT, "--label_column_name", "mood", "--labels", "bad", "fine"),)),
    Case("Y09", "two files in an archive",
         "rows.csv: not one file in the archive; found train.csv, dev.csv, expected one file; "
         "unpack it and name the file", archive, run=(SPLIT,)),
    Case("Y10", "a cut bzip2 file",
         "rows.csv: broken bzip2 file (...); copy or download it again",
         lambda here: (here / "rows.csv").write_bytes(bz2.compress(b"text,label\n" * 9)[:-9]),
         run=(SPLIT,)),
    Case("Y11", "a header twice",
         "rows.csv, line 1: not a header; found 'text' twice, expected one distinct name per "
         "column",
         table("text,text,label", "a,b,1"), run=(SPLIT,)),
    Case("Y12", "a header alone", "rows.csv: no rows; expected at least one row",
         table("text,label"), run=(SPLIT,)),
    Case("Y13", "a text cut inside a character",
         "rows.jsonl, line 2: half a surrogate pair; found \\ud83d, expected whole characters; "
         "take it out of the text",
         table('{"text": "a", "label": 0}', '{"text": "b \\ud83d", "label": 1}', name="rows.jsonl"),
         run=(LINES,)),
)  # fmt: skip
