"""The expression grammar against Python's own arithmetic, and its errors by column."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pem_composition.arithmetic import expression
from pem_composition.errors import UsageError

VALUES = {"a": 2.0, "b": 3.0, "c": 5.0}


def combine(values: list[float], coefficients: list[float]) -> float:
    return sum(c * v for c, v in zip(coefficients, values, strict=True))


def value(text: str, negate=lambda v, s: -s * v) -> float:
    return expression.evaluate(expression.parse(text), VALUES, combine, negate)


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
    assert value(text) == pytest.approx(expected)
    assert expression.evaluate(expression.parse(text), VALUES, combine, None) == pytest.approx(
        expected
    )


def test_the_combination_is_flat_and_in_the_order_written():
    seen = []
    tree = expression.parse("0.5*(a + 2*(b - a)) + mean(c, b)")
    expression.evaluate(
        tree, {n: n for n in "abc"}, lambda m, c: seen.append((m, c)), lambda m, s: m
    )
    assert seen == [(["a", "b", "a", "c", "b"], [0.5, 1.0, -1.0, 0.5, 0.5])]


def test_a_negation_stays_whole_in_parameter_space_and_dissolves_in_delta_space():
    tree = expression.parse("0.5*negate(a + b, 3)")
    calls = []
    expression.evaluate(tree, VALUES, combine, lambda v, s: calls.append((v, s)) or 0.0)
    assert calls == [(5.0, 3.0)]
    flat = []
    expression.evaluate(tree, {n: n for n in "abc"}, lambda m, c: flat.append((m, c)), None)
    assert flat == [(["a", "b"], [-1.5, -1.5])]


def test_names_come_once_in_order():
    assert expression.names(expression.parse("b + a*2 - negate(b) + c")) == ("b", "a", "c")


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
        ("exp(a)", 1, "no function 'exp'"),
        ("negate(a, b)", 1, "wrong arguments of negate"),
        ("negate(2)", 1, "wrong arguments of negate"),
        ("mean(1, a)", 1, "mean takes modules"),
        ("(a, b)", 3, "unexpected ','"),
        ("a.b", 2, "unexpected '.'"),
        ("__import__('os')", 12, 'unexpected "\'"'),
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


@given(st.text(alphabet="ab01.+-*/(), e_xnegate\t", max_size=30))
def test_any_text_is_parsed_or_refused_in_one_line(text):
    try:
        expression.parse(text)
    except UsageError as error:
        assert "\n" not in str(error)
