"""Texts to be judged, from a table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pem_composition.errors import DataError
from pem_composition.tasks.glue import word_of
from pem_composition.tasks.tables import Table


def column_of(table: Table, name: str) -> list[Any]:
    """The values of one column.

    Raises:
        DataError: there is no such column.
    """
    if name not in table.columns:
        raise DataError.build(
            table.name, f"no column '{name}'", found=table.shown,
            do="name the column with --text_column or --label_column",
        )  # fmt: skip
    return [row[name] for row in table.rows]


def texts_of(table: Table, column: str = "text") -> list[str]:
    """The texts of a table; an empty one counts, as a model may write nothing.

    Raises:
        DataError: no such column, or a value that is no text.
    """
    texts = column_of(table, column)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError.build(
                table.where(index), f"column '{column}' is no text", found=type(text).__name__
            )
    return texts


def labelled(
    table: Table, column: str, label_column: str, toxic_label: str
) -> tuple[list[str], NDArray[np.bool_]]:
    """Texts (n) of a table and whether each is toxic: whether its label reads ``toxic_label``.

    Raises:
        DataError: no such column, a text that is none, or no row with this label.
    """
    toxic = np.array([word_of(x) == toxic_label for x in column_of(table, label_column)])
    if not toxic.any():
        found = sorted({word_of(row[label_column]) for row in table.rows})[:5]
        raise DataError.build(
            table.name, "no row has the toxic label", found=", ".join(found), expected=toxic_label,
            do="name it with --toxic_label",
        )  # fmt: skip
    return texts_of(table, column), toxic
