"""Every bad input of docs/bad_input.md ends in its one line, or in the right result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults import case as cases
from faults.catalogue import CASES


def params() -> Iterator[object]:
    """A case with a bound on memory starts a process, which takes seconds."""
    for case in CASES:
        yield pytest.param(case, id=case.id, marks=[pytest.mark.slow] if case.memory else [])


@pytest.mark.parametrize("case", params())
def test_bad_input_ends_in_its_line_or_in_the_right_result(case, here, capsys):
    cases.verify(case, here, capsys)
