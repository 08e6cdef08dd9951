"""The table of methods: what it accepts, what it says about mistakes, what is recorded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pem_composition.arithmetic.methods import registry
from pem_composition.arithmetic.methods.registry import METHODS, Choice, recorded, resolve
from pem_composition.errors import PEMError


def test_the_table_in_the_docs_is_the_registry(repository):
    text = (repository / "docs" / "methods.md").read_text(encoding="utf-8")
    assert registry.table() in text
    rows = re.findall(r"^\| `(\w+)` ", text, re.MULTILINE)
    assert rows == list(METHODS)


@pytest.mark.parametrize("entry", [m for m in METHODS.values() if m.home], ids=lambda m: m.name)
def test_every_method_has_code_that_names_its_source(entry):
    function = entry.function()
    file = Path(__import__("sys").modules[function.__module__].__file__)
    arxiv = re.findall(r"arXiv:[\d.]+|github.com/\S+", entry.source)
    assert all(source.rstrip(".") in file.read_text(encoding="utf-8") for source in arxiv)
    assert entry.rule and entry.acts_on and entry.rank


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_in_their_own_range_and_recorded_text_reads_back(name):
    for kind in METHODS[name].kinds:
        choice = resolve(name, kind=kind)
        assert recorded(str(choice)) == (choice, None)
        assert recorded(f"{choice}, rank 8") == (choice, 8)
        assert resolve(name, choice.as_dict(), kind) == choice


def test_a_recorded_sum_is_task_arithmetic():
    assert recorded("sum") == (Choice("simple"), None)
    assert recorded("sum, rank 12") == (Choice("simple"), 12)


@given(st.floats(min_value=1e-12, max_value=1.0))
def test_a_setting_is_recorded_exactly(density):
    choice = resolve("ties", {"density": density}, "full")
    assert recorded(str(choice))[0].as_dict()["density"] == density


def test_settings_are_read_from_words_as_from_numbers():
    from_words = resolve("della", {"density": "0.4", "epsilon": ".2", "seed": "7"}, "lora")
    assert from_words == resolve("della", {"density": 0.4, "epsilon": 0.2, "seed": 7}, "lora")
    assert str(from_words) == (
        "della(density=0.4, epsilon=0.2, election=total, seed=7, form=dense)"
    )


def test_coordinates_are_a_setting_of_low_rank_modules_alone():
    assert "form=dense" in str(resolve("ties", kind="lora"))
    assert "form" not in str(resolve("ties", kind="ia3"))
    assert "form" not in str(resolve("ties"))  # still open: the kind is not known
    with pytest.raises(PEMError, match=r"form applies to modules of kind lora; found kind full"):
        resolve("ties", {"form": "core"}, "full")


def test_a_method_that_applies_another_takes_its_settings():
    choice = resolve("knots", {"inner": "dare", "density": 0.3}, "lora")
    assert str(choice) == "knots(inner=dare, density=0.3, seed=0)"
    assert str(resolve("ctm", {"inner": "iso_cts"})) == "ctm(inner=iso_cts, beta=0, common=0.8)"
    with pytest.raises(PEMError, match="knots has no setting 'seed'"):
        resolve("knots", {"inner": "ties", "seed": 1}, "lora")
    with pytest.raises(PEMError, match=r"inner must be magnitude, ties, .* or simple; found tsv"):
        resolve("knots", {"inner": "tsv"})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tiess", {}, "method: unknown method 'tiess'; did you mean ties?"),
        ("zipit", {}, "unknown method 'zipit'; expected simple, magnitude, ties"),
        ("ties", {"density": 0}, r"ties: density must be in \(0, 1\]; found 0"),
        ("ties", {"density": "0"}, r"density must be in \(0, 1\]; found 0"),
        ("ties", {"density": 1.5}, r"density must be in \(0, 1\]; found 1.5"),
        ("ties", {"density": float("nan")}, "found nan"),
        ("ties", {"density": True}, "found True"),
        ("ties", {"density": "a"}, "found a"),
        ("ties", {"densty": 0.5}, "ties has no setting 'densty'; did you mean density?"),
        ("tsv", {"q": 1}, "tsv has no setting 'q'; expected no settings"),
        ("dare", {"seed": -1}, "seed must be a whole number >= 0; found -1"),
        ("dare", {"seed": 0.5}, "found 0.5"),
        ("dare", {"seed": "1e3"}, "found 1e3"),
        ("ties", {"election": "sum"}, "election must be total or frequency; found sum"),
        ("breadcrumbs", {"density": 0.8, "gamma": 0.3}, r"density \+ gamma must be at most 1"),
        ("della", {"density": 0.05}, "lower epsilon"),
        ("della", {"density": 1.0}, "lower epsilon"),
    ],
)
def test_a_mistake_is_named(name, settings, message):
    with pytest.raises(PEMError, match=message):
        resolve(name, settings)


def test_a_method_that_a_kind_lacks_is_refused_by_name():
    with pytest.raises(PEMError, match="tsv: not defined for modules of kind ia3; expected kind"):
        resolve("tsv", kind="ia3")


def test_default_coefficients_average_where_the_method_sums():
    for name, settings, expected in (
        ("simple", {}, 0.25), ("dare", {}, 0.25), ("ties", {}, 1.0), ("tsv", {}, 1.0),
        ("knots", {"inner": "dare"}, 0.25), ("knots", {"inner": "ties"}, 1.0),
    ):  # fmt: skip
        choice = resolve(name, settings)
        assert choice.default_coefficients(4) == (expected,) * 4
        by_root = 0.5 if expected == 0.25 else expected  # a method's own coefficient is no rule's
        assert choice.default_coefficients(4, "sqrt") == (by_root,) * 4


@pytest.mark.parametrize(
    "text", ["", "ties(", "ties(density=0.2", "TIES", "ties, rank x", "a(b(c))"]
)
def test_other_text_is_no_record(text):
    with pytest.raises(PEMError):
        recorded(text)
