"""The expression language against Python's own arithmetic, its text, and its errors by column."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from pem_composition.arithmetic import expression, trees
from pem_composition.arithmetic.methods.registry import METHODS, SIMPLE, resolve
from pem_composition.arithmetic.trees import ByLayer, Leaf, Merge, Negation, Sum, Within
from pem_composition.errors import PEMError, UsageError

VALUES = {"a": 2.0, "b": 3.0, "c": 5.0}


class Numbers:
    """Modules are numbers: sums are sums, whatever the space, and a merge is their sum."""

    def combine(self, modules, coefficients, space, rank, *, final):
        return sum(c * v for c, v in zip(coefficients, modules, strict=True))

    def merge(self, modules, coefficients, choice, rank, *, final):
        return self.combine(modules, coefficients, "delta", rank, final=final)

    def negate(self, module, strength, *, final):
        return -strength * module

    def layers(self, module, factors, space, *, final):
        return factors[0][1] * module


class Calls:
    """Every operation as it was asked for; modules are the text of what made them."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def _note(self, *call: object) -> str:
        self.seen.append(call)
        return f"#{len(self.seen)}"

    def combine(self, modules, coefficients, space, rank, *, final):
        return self._note("combine", modules, coefficients, space, rank, final)

    def merge(self, modules, coefficients, choice, rank, *, final):
        return self._note("merge", modules, coefficients, str(choice), rank, final)

    def negate(self, module, strength, *, final):
        return self._note("negate", module, strength, final)

    def layers(self, module, factors, space, *, final):
        return self._note("layers", module, factors, space, final)


def value(text: str, space: str = "parameter") -> float:
    return trees.evaluate(expression.parse(text), VALUES, Numbers(), space)


def calls(text: str, space: str, rank: int | None = None) -> list[tuple]:
    seen = Calls()
    trees.evaluate(expression.parse(text), {n: n for n in "abc"}, seen, space, rank)
    return seen.seen


numbers = st.floats(min_value=0.01, max_value=100).map(lambda x: f"{x:.3f}")
modules = st.recursive(
    st.sampled_from(list(VALUES)),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        st.tuples(inner, st.sampled_from(["+", "-"]), inner).map(lambda t: f"{t[0]}{t[1]}({t[2]})"),
        st.tuples(numbers, inner).map(lambda t: f"{t[0]}*({t[1]})"),
        st.tuples(inner, numbers).map(lambda t: f"({t[0]})*{t[1]}"),
        st.tuples(inner, numbers, numbers).map(lambda t: f"({t[0]})/({t[1]}+{t[2]})"),
        inner.map(lambda t: f"-({t})"),
    ),
    max_leaves=8,
)


@given(modules)
def test_an_expression_has_the_value_python_gives_it(text):
    assert value(text) == pytest.approx(eval(text, {}, VALUES), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", 2.0),
        ("0.6*a + 0.4*(b - c)", 0.4),
        ("-a", -2.0),
        ("--a", 2.0),
        ("2*-a", -4.0),
        ("a - -b", 5.0),
        ("1e-1*a", 0.2),
        ("a*2/4", 1.0),
        ("(1 - 0.4) * a", 1.2),
        ("2*3*a", 12.0),
        ("negate(a)", -2.0),
        ("negate(a, 0.5) + b", 2.0),
        ("negate(negate(a + b), 2*2)", 20.0),
        ("mean(a, b, a + c)", 4.0),
        ("mean(a)", 2.0),
    ],
)
def test_worked_examples(text, expected):
    for space in ("parameter", "delta"):
        assert value(text, space) == pytest.approx(expected)


def test_the_combination_is_flat_and_in_the_order_written():
    text = "0.5*(a + 2*(b - a)) + mean(c, b) + simple(a, c)"
    for space in ("parameter", "delta"):
        names, c = ["a", "b", "a", "c", "b", "a", "c"], [0.5, 1.0, -1.0, 0.5, 0.5, 1.0, 1.0]
        assert calls(text, space) == [("combine", names, c, space, None, True)]


def test_a_negation_stays_whole_in_parameter_space_and_dissolves_in_delta_space():
    assert calls("0.5*negate(a + b, 3)", "parameter") == [
        ("combine", ["a", "b"], [1.0, 1.0], "parameter", None, False),
        ("negate", "#1", 3.0, False),
        ("combine", ["#2"], [0.5], "parameter", None, True),
    ]
    assert calls("0.5*negate(a + b, 3)", "delta") == [
        ("combine", ["a", "b"], [-1.5, -1.5], "delta", None, True)
    ]
    assert calls("negate(a)", "parameter") == [("negate", "a", 1.0, True)]


def test_a_method_stays_whole_and_takes_factors_as_coefficients():
    ties = "ties(density=0.5, election=total)"
    assert calls("0.5*ties(a, 0.5*b, a - c, density=0.5) + 2*c", "delta") == [
        ("combine", ["a", "c"], [1.0, -1.0], "delta", None, False),
        ("merge", ["a", "b", "#1"], [1.0, 0.5, 1.0], ties, None, False),
        ("combine", ["#2", "c"], [0.5, 2.0], "delta", None, True),
    ]
    assert calls("ties(a, b, density=0.5)", "parameter", rank=4) == [
        ("merge", ["a", "b"], [1.0, 1.0], ties, 4, True)
    ]
    # Its arguments are updates, also where the sum around it is one of tensors.
    assert calls("ties(a + b, density=0.5) + c", "parameter")[0] == (
        "combine", ["a", "b"], [1.0, 1.0], "delta", None, False,
    )  # fmt: skip


def test_a_rank_inside_is_not_the_rank_outside():
    ties = "ties(density=0.2, election=total)"
    assert calls("ties(a, b, rank=8)", "delta", rank=4) == [
        ("merge", ["a", "b"], [1.0, 1.0], ties, 8, False),
        ("combine", ["#1"], [1.0], "delta", 4, True),
    ]
    assert calls("a + delta(b + c, rank=2)", "delta") == [
        ("combine", ["b", "c"], [1.0, 1.0], "delta", 2, False),
        ("combine", ["a", "#1"], [1.0, 1.0], "delta", None, True),
    ]
    assert calls("simple(a, b, rank=2)", "parameter") == [
        ("combine", ["a", "b"], [1.0, 1.0], "delta", 2, True)
    ]


def test_spaces_dissolve_in_themselves_alone():
    assert calls("a + 2*delta(b + c)", "delta") == [
        ("combine", ["a", "b", "c"], [1.0, 2.0, 2.0], "delta", None, True)
    ]
    assert calls("a + 2*delta(b + c)", "parameter") == [
        ("combine", ["b", "c"], [1.0, 1.0], "delta", None, False),
        ("combine", ["a", "#1"], [1.0, 2.0], "parameter", None, True),
    ]
    assert calls("delta(a - b)", "parameter") == [
        ("combine", ["a", "b"], [1.0, -1.0], "delta", None, True)
    ]


def test_coefficients_by_layer():
    assert calls('layers(a, "*.0.*", 0.3, "*", -1) + b', "delta") == [
        ("layers", "a", (("*.0.*", 0.3), ("*", -1.0)), "delta", False),
        ("combine", ["#1", "b"], [1.0, 1.0], "delta", None, True),
    ]
    tree = trees.with_layers(expression.parse("ties(a, b) - negate(b)"), {"b": [("*", 0.5)]})
    half = 'layers(b, "*", 0.5)'
    assert str(tree) == f"ties(a, {half}, density=0.2, election=total) - negate({half})"


def test_names_come_once_in_order():
    text = 'b + a*2 - negate(b) + ties(c, a) + layers(d, "*", 2)'
    assert trees.names(expression.parse(text)) == ("b", "a", "c", "d")


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("a + b", "parameter"),
        ("0.5*ties(a, b) + c", "delta"),
        ("negate(tsv(a, b))", "delta"),
        ("reference(a, b)", "parameter"),
        ("simple(a, b)", "parameter"),
        ('layers(a, "*", 2)', "parameter"),
    ],
)
def test_the_space_is_the_papers_unless_updates_are_merged(text, space):
    assert trees.default_space(expression.parse(text)) == space


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("", 1, "unexpected 'the end'"),
        ("a +", 4, "unexpected 'the end'"),
        ("a b", 3, "unexpected 'b'"),
        ("a ** 2", 4, "unexpected '*'"),
        ("a * b", 3, "two modules cannot be multiplied"),
        ("1 + a", 3, "a number and a module cannot be added"),
        ("2 / a", 3, "division by a module"),
        ("a / 0", 3, "division by zero"),
        ("a / (1 - 1)", 3, "division by zero"),
        ("(a + b", 7, "unexpected 'the end'"),
        ("a)", 2, "unexpected ')'"),
        ("exp(a)", 1, "no function 'exp'; expected negate, mean"),
        ("a + tise(b)", 5, "no function 'tise'; did you mean ties?"),
        ("ties(a, b, density=0)", 12, "ties: density must be in (0, 1]; found 0"),
        ("ties(a, b, density=)", 20, "unexpected ')'; expected the value of density"),
        ("ties(a, density=0.2, b)", 22, "an argument after a setting"),
        ("ties(a, density=.2, density=.3)", 21, "density given twice"),
        ("ties(a, seed=1)", 9, "ties has no setting 'seed'"),
        ("ties(2, a)", 6, "ties takes modules, not numbers"),
        ("ties(density=0.2)", 1, "wrong arguments of ties; expected at least one module"),
        ("ties(a, rank=0)", 9, "not a rank; found 0"),
        ("reference(a, rank=2)", 1, "reference takes no rank"),
        ("simple(a, density=1)", 11, "simple has no setting 'density'"),
        ("mean(a, rank=1)", 9, "mean has no setting 'rank'"),
        ("delta(a, b)", 1, "wrong arguments of delta"),
        ("parameter(a, rank=2)", 14, "parameter has no setting"),
        ('layers(a, "*")', 1, "wrong arguments of layers"),
        ('layers(a, "[", 1)', 11, "a bracket is not closed"),
        ('layers(a, 1, "x")', 1, "wrong arguments of layers"),
        ('"a"', 1, "unexpected '\"a\"'"),
        ("ties(a, x=-b)", 12, "unexpected 'b'"),
        ("a = b", 3, "unexpected '='"),
        ("negate(a, b)", 1, "wrong arguments of negate"),
        ("negate(2)", 1, "wrong arguments of negate"),
        ("mean(1, a)", 6, "mean takes modules"),
        ("negate(x=1)", 1, "wrong arguments of negate"),
        ("layers(x=1)", 1, "wrong arguments of layers"),
        ("(a, b)", 3, "unexpected ','"),
        ("a.b", 2, "unexpected '.'"),
        ("__import__('os')", 12, 'unexpected "\'"'),
        ("a" + " + a" * 1000, 3999, "too many terms"),
        ("a + 1e999*b", 5, "too large"),
        ("1e308*(10*a)", 6, "too large"),
        ("(" * 60 + "a" + ")" * 60, 51, "too many nested"),
    ],
)
def test_an_error_points_at_its_column(text, column, reason):
    with pytest.raises(UsageError) as caught:
        expression.parse(text)
    assert str(caught.value).startswith(f"expression, column {column}: ")
    assert reason in str(caught.value)


def test_a_number_alone_is_no_module():
    with pytest.raises(UsageError, match="a number, not a module"):
        expression.parse("1 + 2")


def test_a_text_without_end_is_refused():
    with pytest.raises(UsageError, match="expression: too long; found 20001 characters"):
        expression.parse("a" + " " * 20_000)


# --- text and back ---

coefficients = st.one_of(
    st.floats(-1e3, 1e3, allow_subnormal=False), st.sampled_from([1.0, -1.0, 0.0, 1e-300])
)
ranks = st.none() | st.integers(1, 99)
leaves = st.sampled_from(["a", "b", "_x9", "mean"]).map(Leaf)
sets = st.sampled_from(
    [
        ("ties", {"density": 0.31, "election": "frequency"}),
        ("dare", {"seed": 7, "density": 1e-5}),
        ("knots", {"inner": "della", "epsilon": 0.25}),
        ("ctm", {"inner": "tsv", "beta": 0.5}),
        ("sce", {"form": "dense"}),
        ("iso_c", {}),
    ]
)


def sums(inner: st.SearchStrategy) -> st.SearchStrategy:
    terms = st.lists(st.tuples(coefficients, inner), min_size=1, max_size=3)
    return terms.map(lambda t: Sum(tuple(t)))


def deeper(inner: st.SearchStrategy) -> st.SearchStrategy:
    parts = sums(inner)
    arguments = st.lists(parts, min_size=1, max_size=3).map(tuple)
    factors = st.lists(
        st.tuples(st.sampled_from(["*", "*.[0-5].q", "x?"]), coefficients), min_size=1, max_size=2
    ).map(tuple)
    return st.one_of(
        st.builds(Negation, parts, coefficients),
        st.builds(Within, st.just("delta"), parts, ranks),
        st.builds(Within, st.just("parameter"), parts),
        st.builds(ByLayer, parts, factors),
        st.builds(lambda s, a, r: Merge(resolve(*s), a, r), sets, arguments, ranks),
    )


@examples(200)
@given(sums(st.recursive(leaves, deeper, max_leaves=6)))
def test_the_text_of_a_tree_is_parsed_to_the_tree(tree):
    assert expression.parse(str(tree)) == tree


@pytest.mark.parametrize("name", [n for n in METHODS if n != SIMPLE])
def test_every_method_is_a_function_of_the_language(name):
    space = METHODS[name].space
    tree = expression.parse(f"0.5*{name}(a, 2*b)")
    assert expression.parse(str(tree)) == tree
    assert trees.default_space(tree) == space


WORDS = st.lists(
    st.sampled_from(
        ["a", "b", "0.5", "1e3", "+", "-", "*", "/", "(", ")", ",", "=", '"*"', "ties(", "negate(",
         "mean(", "delta(", "layers(", "density=", "rank=", "inner=", "knots(", " ", "0.2", "3"]
    ),
    max_size=25,
).map("".join)  # fmt: skip


@examples(300)
@given(st.one_of(WORDS, st.text(max_size=30)))
def test_any_text_is_parsed_or_refused_in_one_line(text):
    try:
        tree = expression.parse(text)
    except PEMError as error:
        assert "\n" not in str(error)
    else:
        assert expression.parse(str(tree)) == tree
