"""ROUGE-L by hand."""

from __future__ import annotations

import random

import pytest

from pem_composition.evaluation.overlap import longest_common, rouge_l, words


@pytest.mark.parametrize(
    ("answer", "reference", "common", "expected"),
    [
        # Lin 2004, section 3.1: S1 police killed the gunman; S2 and S3 share 3 and 2 words of it.
        ("police kill the gunman", "police killed the gunman", 3, 2 * 3 / 8),
        ("the gunman kill police", "police killed the gunman", 2, 2 * 2 / 8),
        ("a b c d e", "a c e", 3, 2 * 3 / 8),
        ("The cat, sat!", "the CAT sat", 3, 1.0),
        ("no words shared", "something else entirely", 0, 0.0),
        ("", "a reference", 0, 0.0),
        ("...", "a reference", 0, 0.0),
        (
            "\N{LATIN SMALL LETTER E WITH ACUTE}t\N{LATIN SMALL LETTER E WITH ACUTE} 42_a",
            "42 a",
            2,
            0.8,
        ),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(
    answer, reference, common, expected
):
    assert longest_common(words(answer), words(reference)) == common
    assert rouge_l(answer, reference) == pytest.approx(expected)
    assert rouge_l(reference, answer) == pytest.approx(expected)


def by_definition(x, y):
    """Try every subsequence of the shorter text."""
    best = 0
    for mask in range(1 << len(x)):
        chosen = [w for i, w in enumerate(x) if mask >> i & 1]
        rest = iter(y)
        if all(w in rest for w in chosen):
            best = max(best, len(chosen))
    return best


def test_the_longest_common_subsequence_is_that_of_the_definition():
    draw = random.Random(0)
    for _ in range(60):
        x = [draw.choice("abc") for _ in range(draw.randrange(9))]
        y = [draw.choice("abc") for _ in range(draw.randrange(12))]
        assert longest_common(x, y) == by_definition(x, y)
