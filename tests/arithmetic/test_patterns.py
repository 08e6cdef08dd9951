"""Name patterns against the standard library's on what both have, and bounded in time."""

from __future__ import annotations

import fnmatch
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pem_composition.arithmetic.patterns import compile_pattern
from pem_composition.errors import PEMError

LAYER = "roberta.encoder.layer.4.attention.self.query"


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("*", True),
        (LAYER, True),
        ("*.layer.[0-5].*", True),
        ("*.layer.[5-9].*", False),
        ("*.layer.[!5-9].*", True),
        ("*.layer.1[01].*", False),
        ("*.query", True),
        ("query", False),
        ("*layer.?.*", True),
        ("*layer.??.*", False),
        ("roberta.*.self.*", True),
        ("*Query", False),
    ],
)
def test_patterns_of_layers(pattern, fits):
    assert compile_pattern(pattern).matches(LAYER) is fits


@given(st.text("ab[]!-*?.", min_size=1, max_size=8), st.text("ab-.]!", max_size=8))
def test_what_matches_is_what_fnmatch_matches(pattern, name):
    try:
        ours = compile_pattern(pattern)
    except PEMError:
        assert "[" in pattern
        return
    if re.search(r"\[[^]]*-", pattern) or "[!]" in pattern:
        return  # ranges that begin or end with a bracket: fnmatch has rules of its own
    assert ours.matches(name) == fnmatch.fnmatchcase(name, pattern)


@pytest.mark.parametrize("pattern", ["", "a" * 501, "*.layer.[0-5.*", "[", "[!", "[]"])
def test_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(PEMError, match=r"pattern: (not a pattern|a bracket is not closed)"):
        compile_pattern(pattern)


def test_stars_cannot_make_it_slow():
    """Steps grow with len(name) * len(pattern), where a backtracking matcher's explode."""
    pattern = compile_pattern("*a" * 100 + "b")
    start = time.process_time()
    assert not pattern.matches("a" * 2000)
    assert time.process_time() - start < 5  # 2^2000 otherwise
