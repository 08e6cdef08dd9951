"""Flags from dataclasses: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pem_composition import cli
from pem_composition._version import __version__
from pem_composition.cli import groups, load, parser
from pem_composition.errors import DataError, RunFailed, UsageError


@dataclass(frozen=True, kw_only=True)
class Flags:
    out: Path = field(metadata={"short": "-p", "help": "where"})
    weights: tuple[float, ...] = field(default=(), metadata={"short": "-w"})
    span: tuple[float, float, float] | None = None
    names: list[str] = field(default_factory=list)
    steps: int = 3
    rate: float | None = None
    merge_head: bool = field(default=False, metadata={"short": "-m", "help": "100 % of the heads"})
    maybe: bool | None = None
    mode: Literal["a", "b"] = "a"
    way: str | None = field(default=None, metadata={"choices": ("x", "y")})


@dataclass(frozen=True, kw_only=True)
class WithPositional:
    text: str = field(metadata={"positional": True})
    force: bool = field(default=False, metadata={"short": "-f"})
    bind: tuple[str, ...] = field(default=(), metadata={"repeat": True})


def read(*argv: str) -> Flags:
    return parser.parse(Flags, ["-p", "o", *argv], "prog")


def refused(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_defaults_are_those_of_the_dataclass():
    assert read() == Flags(out=Path("o"))


def test_every_kind_of_value_reaches_its_type():
    flags = read(
        "-w",
        "1",
        ".5",
        "--span",
        "0",
        "0.1",
        "1",
        "--names",
        "x",
        "y",
        "--steps",
        "7",
        "--rate",
        "2e-4",
        "--mode",
        "b",
        "--way",
        "y",
    )
    assert flags == Flags(
        out=Path("o"),
        weights=(1.0, 0.5),
        span=(0.0, 0.1, 1.0),
        names=["x", "y"],
        steps=7,
        rate=2e-4,
        mode="b",
        way="y",
    )


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], False),
        (["--merge_head"], True),
        (["-m"], True),
        (["--merge_head", "true"], True),
        (["--merge_head", "FALSE"], False),
        (["--merge_head=false"], False),
        (["--no-merge_head"], False),
        (["--no_merge_head"], False),
        (["--no-merge-head"], False),
        (["--merge-head"], True),
        (["--merge_head", "--no-merge_head"], False),
        (["--no-merge_head", "--merge_head"], True),
    ],
)
def test_booleans_mean_what_they_say(argv, value):
    assert read(*argv).merge_head is value


def test_an_optional_boolean_knows_absent_from_false():
    assert read().maybe is None
    assert read("--maybe").maybe is True
    assert read("--no-maybe").maybe is False


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_is_read_back_exactly_wherever_it_stands(value):
    assert read("-w", repr(value), "0.25").weights == (value, 0.25)
    assert read("-w", "0.25", repr(value)).weights == (0.25, value)
    assert read("--rate", repr(value)).rate == value
    assert read(f"--rate={value!r}").rate == value


@pytest.mark.parametrize("number", ["-7e-1", "-1e-3", "-.5", "-2.", "+3", "1E5"])
def test_exponents_and_signs_are_numbers_after_a_list_flag(number):
    assert read("-w", "0.3", number).weights == (0.3, float(number))


@pytest.mark.parametrize(
    "word",
    [
        "nan", "-nan", "inf", "-inf", "Infinity", "1e999", "0x1p3", "1_000", "x", "-7e-1x", "0,3",
        "\u0663",
    ],
)  # fmt: skip
def test_what_is_no_finite_number_is_refused_by_flag_and_word(word):
    message = refused("-w", "0.3", word)
    assert message.startswith("--weights: ")
    assert repr(word)[1:-1] in message


@pytest.mark.parametrize("word", ["1.5", "1e3", "1_0", "x", "", "\u0663"])
def test_a_whole_number_has_no_fraction(word):
    assert "--steps: " in refused("--steps", word)


@given(st.integers())
def test_a_whole_number_fits_in_64_bits(value):
    """Beyond them torch and NumPy overflow, in the middle of the work."""
    if abs(value) < 10**18:
        assert read("--steps", f"{value:+d}").steps == value
        assert read("--steps", "-" * (value < 0) + "0" * 5000 + str(abs(value))).steps == value
    for far in (10**18 + abs(value), -(10**18) - abs(value)):
        assert "--steps: " in (told := refused(f"--steps={far}"))
        assert "expected a whole number of at most 18 digits" in told


def test_every_seed_has_the_range_of_the_generators():
    seeds = [(name, meta) for _, name, meta in RANGED if name.endswith("seed")]
    flags = [
        spec.name
        for program in cli.SUBCOMMANDS
        for spec in dataclasses.fields(load(program).Config)
        if spec.name.endswith("seed")
    ]
    assert len(seeds) == len(flags) > 10
    for _, meta in seeds:
        np.random.RandomState(meta["most"])
        with pytest.raises(ValueError):
            np.random.RandomState(meta["most"] + 1)
        assert meta["least"] == 0


def test_a_boolean_takes_no_other_word():
    assert refused("--merge_head", "maybe") == "--merge_head: found 'maybe', expected true or false"


@pytest.mark.parametrize("flag", ["--merge_hea", "--step", "--weight", "--merge_haed"])
def test_flags_are_not_abbreviated_and_the_near_one_is_named(flag):
    message = refused(flag, "1")
    assert message.startswith(f"{flag}: unknown flag")
    assert "did you mean --" in message


def test_a_single_dash_before_a_long_name_is_not_a_short_flag_with_a_value():
    assert refused("-weights", "1") == "-weights: unknown flag; did you mean --weights?"


def test_a_list_given_twice_is_refused_and_a_single_value_may_be_corrected():
    assert "given twice" in refused("-w", "1", "--weights", "2")
    assert read("--steps", "1", "--steps", "2").steps == 2


def test_an_empty_path_is_an_unset_variable():
    with pytest.raises(UsageError, match="shell variable"):
        parser.parse(Flags, ["-p", ""], "prog")


def test_a_missing_flag_is_named():
    with pytest.raises(UsageError, match="missing -p/--out"):
        parser.parse(Flags, [], "prog")


@pytest.mark.parametrize("argv", [["--mode", "c"], ["--way", "z"]])
def test_a_choice_is_one_of_those_listed(argv):
    assert "'" + argv[1] + "'" in refused(*argv)


def test_the_wrong_number_of_values_is_refused():
    assert "expected 3 arguments" in refused("--span", "0", "1")


@pytest.mark.parametrize("text", ["-a+b", "-0.5*a", "- a", "(a)", "-(a)"])
def test_an_expression_may_start_with_a_minus(text):
    assert parser.parse(WithPositional, [text], "prog").text == text


def test_a_boolean_does_not_swallow_the_argument_after_it():
    assert parser.parse(WithPositional, ["-f", "a+b"], "prog") == WithPositional(
        text="a+b", force=True
    )
    assert parser.parse(WithPositional, ["-f", "false", "a+b"], "prog") == WithPositional(
        text="a+b", force=False
    )


def test_a_repeated_flag_collects():
    flags = parser.parse(WithPositional, ["t", "--bind", "a=1", "--bind", "b=2"], "prog")
    assert flags.bind == ("a=1", "b=2")


def test_help_shows_every_flag_and_default_and_survives_percent_signs(capsys):
    module = SimpleNamespace(
        Config=Flags, HELP="what it does", EXAMPLES="\n  prog -p x\n", NAME="x", run=lambda c: 0
    )
    assert parser.run(module, ["--help"], "prog") == 0
    text = capsys.readouterr().out
    for word in (
        "-w",
        "--weights",
        "--span",
        "--no",
        "100 % of the heads",
        "(default: 3)",
        "--debug",
        "prog -p x",
    ):
        assert word in text or word == "--no"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError.build("f.csv, line 3", "no label", found="x", expected="0 or 1"), 2),
        (RunFailed.build("train", "the loss is not finite"), 3),
        (OSError(28, "No space left on device", "out"), 3),
        (FileNotFoundError(2, "No such file or directory", "in"), 2),
        (KeyError("x"), 3),
        (KeyboardInterrupt(), 130),
        (ValueError("two\nlines"), 3),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(error, code, capsys):
    def body() -> int:
        raise error

    assert parser.guarded(body, "prog") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("prog: error: ")
    assert "Traceback" not in captured.err


def test_debug_shows_where_an_error_came_from(capsys):
    def run(config: Flags) -> int:
        raise DataError.build("here", "wrong")

    module = SimpleNamespace(Config=Flags, HELP="", NAME="x", run=run)
    assert parser.run(module, ["-p", "o", "--debug"], "prog") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("prog: error: here: wrong\n")


RANGED = [
    (program, spec.name, spec.metadata)
    for program in cli.SUBCOMMANDS
    for spec in dataclasses.fields(load(program).Config)
    if {"least", "above", "most", "below"} & set(spec.metadata)
]


def words_of(spec, hint):
    """A required flag with any value; of an argument its first word."""
    positional = spec.metadata.get("positional")
    return (typing.get_args(hint) or ("1",))[:1] if positional else (f"--{spec.name}", "1")


@pytest.mark.parametrize(("program", "name", "meta"), RANGED)
def test_a_number_outside_its_declared_range_is_refused_by_its_flag(pem, program, name, meta):
    """Before anything else is asked for but what argparse itself requires."""
    config = load(program).Config
    hints = typing.get_type_hints(config)
    required = [
        word
        for spec in dataclasses.fields(config)
        if spec.init
        and spec.default is dataclasses.MISSING
        and spec.default_factory is dataclasses.MISSING
        for word in words_of(spec, hints[spec.name])
    ]
    outside = [meta["least"] - 1] if "least" in meta else []
    outside += [meta["above"]] if "above" in meta else []
    outside += [meta["most"] + 1] if "most" in meta else []
    outside += [meta["below"]] if "below" in meta and "float" in str(hints[name]) else []
    assert outside
    for value in outside:
        done = pem(program, *required, f"--{name}={value}")
        assert done.code == 2
        assert f"--{name}: cannot be used; found {value:.10g}" in done.err.replace(".0,", ",")
        assert "expected a number" in done.err


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--lr", "--learning_rate"),
        ("--epochs", "--num_train_epochs"),
        ("--batch_size", "--per_device_train_batch_size"),
        ("--model", "--model_name_or_path"),
        ("--lora_rank", "--lora_r"),
        ("--learning-rat", "--learning_rate"),
    ],
)
def test_the_flag_that_was_meant_is_proposed(pem, wrong, right):
    assert f"did you mean {right}?" in pem("train", wrong, "1").err


def test_every_flag_of_training_stands_under_a_title_and_what_must_be_given_comes_first():
    required = {"model_name_or_path", "output_dir"}
    names = {spec.name for spec in dataclasses.fields(load("train").Config)}
    assert names - required <= set(groups.TITLES)
    text = parser.build_parser(load("train").Config, "pem train", "").format_help()
    titles = [line[:-1] for line in text.splitlines() if line[:1].isalpha() and line[-1:] == ":"]
    assert titles[0] == groups.OWN
    assert [t for t in groups.GROUPS if t in titles] == titles[1:-1]
    own = text.partition(f"{titles[1]}:")[0]
    assert {name for name in names if f"--{name} " in own} == required


def test_a_flag_is_under_one_title():
    assert sum(map(len, groups.GROUPS.values())) == len(groups.TITLES)


@dataclass(frozen=True, kw_only=True)
class Needing(Flags):
    NEEDS: typing.ClassVar = {"merge_head": ("steps", "rate")}


def test_a_flag_that_needs_another_one_is_refused_without_it_even_at_its_default():
    assert parser.parse(Needing, ["-p", "o", "-m", "--rate", "2"], "prog").rate == 2
    for argv in (["--steps", "3"], ["--rate=1"], ["--rate", "1", "--no-merge_head"]):
        with pytest.raises(UsageError, match="has no effect without --merge_head"):
            parser.parse(Needing, ["-p", "o", *argv], "prog")


def test_the_program_says_its_version_and_helps_by_name(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pem-composition {__version__}\n"
    assert cli.main(["help", "merge"]) == 0
    assert capsys.readouterr().out.startswith("usage: pem merge ")
