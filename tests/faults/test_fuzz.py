"""Laws of damaged input, on a bounded number of random examples; scripts/fuzz.py runs many more."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import laws
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

EXAMPLES = 75


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules and models that the targets damage."""
    return laws.prepare(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def inside(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload that runs leaves its mark in the working directory."""
    monkeypatch.chdir(root)


@pytest.mark.parametrize("target", laws.TARGETS, ids=lambda target: target.name)
def test_damaged_input_is_refused_in_one_line_or_read_truly(target, root):
    @settings(max_examples=EXAMPLES, derandomize=True, database=None)
    @given(st.randoms(use_true_random=False))
    def law(rng):
        laws.check(target, root, rng)

    law()
