"""Requests to add, scale and negate: wrong counts, names and numbers, and sums PEFT gets wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults import damage as d
from faults import oracle
from faults.case import READERS, Case
from faults.oracle import close, updates, weighted
from faults.world import CONFIG, LAYER, WEIGHTS
from safetensors.torch import load_file, save_file

import pem_composition as library

Check = Callable[[Path], object]
DELTA = ("--space", "delta")
TWO = ("merge", "-a", "good", "bad", "-p", "out")
ZERO = "error against sum c_i dW_i: ...e-..."


def sum_of(**coefficients: float) -> Check:
    """The written update is sum_i c_i dW_i, and the stated error is true."""

    def check(here: Path) -> None:
        close(updates(here / "out"), weighted(*((c, updates(here / n))
                                                for n, c in coefficients.items())))  # fmt: skip

    return check


def opposite(here: Path) -> None:
    """bad does the opposite of good."""
    held = load_file(here / "good" / WEIGHTS)
    held = {n: -t if "lora_B" in n else t for n, t in held.items()}
    save_file(held, here / "bad" / WEIGHTS, metadata={"format": "pt"})


def same_bits(name: str) -> Check:
    """The written tensors are those of a module, bit for bit."""

    def check(here: Path) -> None:
        found, exact = (load_file(here / n / WEIGHTS) for n in ("out", name))
        assert found.keys() == exact.keys()
        assert all(torch.equal(found[n], exact[n]) for n in exact)

    return check


def stated(rank: int, **coefficients: float) -> Check:
    """The written update is the best of its rank, and the program prints how far off that is."""

    def check(here: Path) -> None:
        exact = weighted(*((c, updates(here / n)) for n, c in coefficients.items()))
        best = oracle.truncated(exact, rank)
        close(updates(here / "out"), best)
        record = library.load(here / "out").provenance
        note = next(n for n in record.notes if "made as" in n)
        assert note
        header = library.checkpoint.inspect_header(here / "out")
        total = header.provenance.certificate.total
        assert abs(total - oracle.distance(best, exact)) < 1e-6

    return check


def rounded_up(here: Path) -> None:
    """rank 1000 is no more than there is: 4 + 4."""
    sum_of(good=0.5, bad=0.5)(here)
    ranks = {t.shape[0] for n, t in load_file(here / "out" / WEIGHTS).items() if "lora_A" in n}
    assert ranks == {8}


def combine(names: str, coefficients: list[Any], **options: Any) -> Callable[[Path], object]:
    """The sum in Python; for a result, written to out."""

    def run(_folder: Path) -> None:
        modules = [library.load(name) for name in names.split()]
        library.combine(modules, coefficients, **options).save("out")

    return run


def heads(here: Path) -> None:
    """The head is the average of both."""
    sum_of(good=0.5, bad=0.5)
    good, bad, out = (oracle.head(here / n) for n in ("good", "bad", "out"))
    assert out.keys() == good.keys()
    for name, value in out.items():
        assert abs(value - (good[name] + bad[name]) / 2).max() < 1e-6


def head_of_good(here: Path) -> None:
    """The head is good's, whose module is the only one with a head."""
    good, out = (oracle.head(here / n) for n in ("good", "out"))
    assert out.keys() == good.keys() and all((out[n] == good[n]).all() for n in good)


def reloaded(here: Path) -> None:
    """A flat directory that reads back bit for bit, and says what it was made of."""
    assert {p.name for p in (here / "out").iterdir()} == {
        CONFIG, WEIGHTS, "pem.json", "README.md"}  # fmt: skip
    sum_of(good=0.3, bad=0.7)
    again = library.load(here / "out")
    again.save(here / "out" / "again")
    found, exact = (load_file(here / n / WEIGHTS) for n in ("out/again", "out"))
    assert all(torch.equal(found[n], exact[n]) for n in exact)
    record = library.checkpoint.inspect_header(here / "out").provenance
    assert [(t.coefficient, t.label) for t in record.terms] == [(0.3, "good"), (0.7, "bad")]
    assert all(re.fullmatch("[0-9a-f]{64}", s.sha256) for s in record.sources)


def same_as_numbers(here: Path) -> None:
    """0.5 and 0.5, text or not."""
    expected = library.combine([library.load(here / n) for n in ("good", "bad")], [0.5, 0.5])
    assert all(torch.equal(t, expected.tensors[n])
               for n, t in library.load(here / "out").tensors.items())  # fmt: skip


def count(flag: str, what: str, found: int, expected: int) -> str:
    return f"{flag}: one {what} per module is needed; found {found}, expected {expected}"


def ia3_sum(here: Path) -> None:
    """l = 1 + (l_1 - 1) + (l_2 - 1)."""
    sum_of(ia3=1.0, ia3b=1.0)(here)
    assert all(0 < (v + 1).mean() < 2 for v in updates(here / "out").values())


REQUESTS = (
    Case("M03", "one module at -0.5",
         "out = -0.5*good  (space delta, head average, error against sum c_i dW_i: 0)",
         run=(("merge", "-a", "good", "-p", "out", "--coefficients", "-0.5", *DELTA),), code=0,
         check=sum_of(good=-0.5)),
    Case("M03b", "one module, exact sum asked for",
         "out = +1*good  (space delta, head average, error against sum c_i dW_i: 0)",
         run=(("merge", "-a", "good", "-p", "out", *DELTA),), code=0, check=same_bits("good")),
    Case("M20b", "one module and a typo in the method",
         "--merge_way: unknown method 'linaer'; expected simple, ...",
         run=(("merge", "-a", "good", "-p", "out", "-w", "linaer"),)),
    Case("M04", "no modules",
         "-a/--adapters: wrong number of modules; found 0, expected at least one",
         run=(("merge", "-p", "out"),)),
    Case("M04b", "no modules, in Python",
         "modules: there is nothing to combine; found no modules, expected at least one; "
         "give the modules to combine", run=combine("", [])),
    Case("M05", "fewer coefficients than modules", count("--coefficients", "coefficient", 1, 2),
         run=((*TWO, "--coefficients", "0.5"),)),
    Case("M05b", "more coefficients than modules", count("--coefficients", "coefficient", 3, 2),
         run=((*TWO, "--coefficients", "0.5", "0.5", "0.5"),)),
    Case("M05c", "fewer coefficients than modules, exact sum",
         count("--coefficients", "coefficient", 1, 2),
         run=((*TWO, *DELTA, "--coefficients", "0.5"),)),
    Case("M13d", "fewer coefficients than (IA)^3 modules",
         count("--coefficients", "coefficient", 1, 2),
         run=(("merge", "-a", "ia3", "ia3b", "-p", "out", "--coefficients", "1"),)),
    Case("M06", "the same module twice, 0.5 and 0.5",
         f"out = +0.5*good +0.5*good  (space parameter, head average, {ZERO})",
         run=(("merge", "-a", "good", "good", "-p", "out", "--coefficients", "0.5", "0.5"),),
         code=0, check=same_bits("good")),
    Case("M07", "a module that is not there",
         "zz: no such directory; expected a directory with a module; check the path",
         run=(("merge", "-a", "good", "zz", "-p", "out"), ("negation", "-a", "zz", "-p", "out"))),
    Case("M07b", "a name that is bound to nothing",
         "expression: no module named 'zz'; found names ['a']; add --module zz=DIR",
         run=(("compose", "a + zz", "--module", "a=good", "-p", "out"),)),
    Case("M08", "the output exists",
         "wide: the output exists; found a directory with files, expected no such directory; "
         "choose another path or overwrite it (--overwrite)",
         run=(("merge", "-a", "good", "bad", "-p", "wide"), ("negation", "-a", "bad", "-p", "wide"),
              ("compose", "-a", "--module", "a=good", "-p", "wide"))),
    Case("M08b", "the output is an input",
         "good: the output would replace an input; found good; choose another --save_path",
         run=(("merge", "-a", "good", "bad", "-p", "good", "--overwrite"),
              ("negation", "-a", "good", "-p", "good", "--overwrite"))),
    Case("M18", "coefficient nan",
         "--coefficients: found 'nan', expected a finite number",
         run=((*TWO, "--coefficients", "nan", "1"),)),
    Case("M18b", "coefficient inf, exact sum of rank 4",
         "--coefficients: found 'inf', expected a finite number",
         run=((*TWO, *DELTA, "--rank", "4", "--coefficients", "inf", "1"),)),
    Case("M18c", "coefficient -inf, exact sum, in Python",
         "coefficients: a coefficient must be a finite number; found -inf",
         run=combine("good bad", [1.0, float("-inf")], space="delta")),
    Case("M19", "coefficients as text, in Python", "taken for the numbers they are",
         run=combine("good bad", ["0.5", "0.5"]), code=0,
         check=same_as_numbers),
    Case("M20", "typo in the method",
         "--merge_way: unknown method 'linaer'; expected simple, ...",
         run=((*TWO, "-w", "linaer"),)),
    Case("M20c", "a method that ends like one there is",
         "--merge_way: unknown method 'foosvd'; expected simple, ...",
         run=((*TWO, "-w", "foosvd"),)),
    Case("M22", "rank 0", "--rank: not a rank; found 0, expected a whole number >= 1 ...",
         run=((*TWO, *DELTA, "--rank", "0"),)),
    Case("M22b", "rank 1000 of at most 8",
         f"out = +0.5*good +0.5*bad  (space delta, head average, {ZERO})",
         run=((*TWO, *DELTA, "--rank", "1000"),), code=0, check=rounded_up),
    Case("M22c", "rank 2 of 8: most is lost",
         "out = +0.5*good +0.5*bad  (space delta, head average, error against sum c_i dW_i: 0...)",
         run=((*TWO, *DELTA, "--rank", "2"),), code=0, check=stated(2, good=0.5, bad=0.5)),
    Case("M22d", "rank 1.0: a rank, or all of the energy?",
         "--rank: all of the energy needs no rank; found 1.0, expected a whole number ...",
         run=((*TWO, *DELTA, "--rank", "1.0"),)),
    Case("M25", "save a merge and load it again",
         "out = +0.3*good +0.7*bad  (space parameter, head average, ...)",
         run=((*TWO, "--coefficients", "0.3", "0.7"),), code=0, check=reloaded),
)  # fmt: skip


EQUAL = "combine in delta space (--space delta), which needs none of this to be equal"

KINDS = (
    Case("M09", "ranks 4 and 6",
         f"good and wide: rank r at {LAYER.format(0, 'query')} differs; found 4 in good and 6 in "
         f"wide, expected equal values; {EQUAL}",
         run=(("merge", "-a", "good", "wide", "-p", "out"),)),
    Case("M09b", "ranks 4 and 6, exact sum",
         f"out = +0.5*good +0.5*wide  (space delta, head average, {ZERO})",
         run=(("merge", "-a", "good", "wide", "-p", "out", *DELTA),), code=0,
         check=sum_of(good=0.5, wide=0.5)),
    Case("M12", "LoRA and (IA)^3",
         "... and ...: kind differs; found lora in ... and ia3 in ..., expected equal values; "
         "combine modules of one kind",
         run=(("merge", "-a", "good", "ia3", "-p", "out"),
              ("merge", "-a", "good", "ia3", "-p", "out", *DELTA),
              ("compose", "a - b", "--module", "a=good", "--module", "b=ia3", "-p", "out"))),
    Case("M14", "both bring a head",
         "out = +0.5*good +0.5*bad  (space parameter, head average, ...)",
         run=((*TWO, "--merge_head"),), code=0, check=heads),
    Case("M14b", "classes named in one module only, heads averaged",
         "out = +0.5*good +0.5*bad  (space parameter, head average, ...)",
         d.record(head={"labels": ["no", "maybe", "yes"], "problem": "classification"}),
         run=((*TWO, "--merge_head"),), code=0, check=heads),
    Case("M14c", "the last module has no head",
         "out = +0.5*good +0.5*bad  (space parameter, head last, ...)\nnote: bad has no head: that "
         "of good is kept",
         d.both(d.drop("classifier"), d.config(modules_to_save=None, task_type=None)),
         run=((*TWO, "--head", "last"),), code=0, check=head_of_good),
    Case("M13b", "(IA)^3, 1 + 1", f"out = +1*ia3 +1*ia3b  (space parameter, head average, {ZERO})",
         run=(("merge", "-a", "ia3", "ia3b", "-p", "out", "--coefficients", "1", "1"),), code=0,
         check=ia3_sum),
    Case("M13c", "(IA)^3 at -1", f"out = +1*negate(ia3, 1)  (space parameter, {ZERO})",
         run=(("negation", "-a", "ia3", "-p", "out"),), code=0, check=sum_of(ia3=-1.0)),
    Case("M15", "LoRA and DoRA",
         "bad: DoRA scales the base's weights, so its modules have no sum; found use_dora, "
         "expected LoRA; fold it into its base (pem fold), then take its LoRA out of that "
         "(pem extract)",
         d.both(d.config(use_dora=True), d.magnitudes()),
         run=(*READERS[:4], ("compose", "a - bad", "--module", "a=good", "--module", "bad=bad",
                             "-p", "out"))),
    Case("M15b", "DoRA magnitudes in the weights",
         f"bad/{WEIGHTS}: DoRA magnitudes of '{LAYER.format(0, 'query')}' do not fit use_dora; "
         "found magnitudes (32,), expected none, as use_dora is false; restore ...",
         d.add(f"base_model.model.{LAYER.format(0, 'query')}.lora_magnitude_vector",
               torch.ones(32))),
    Case("M16", "rank-stabilised LoRA, exact sum of rank 4",
         f"out = +1*rs  (space delta, head average, {ZERO})",
         run=(("merge", "-a", "rs", "-p", "out", *DELTA, "--rank", "4"),), code=0,
         check=sum_of(rs=1.0)),
    Case("M16b", "rank-stabilised LoRA, alone at 1",
         "out = +1*rs  (space parameter, head average, error against sum c_i dW_i: 0)",
         run=(("merge", "-a", "rs", "-p", "out"),), code=0, check=same_bits("rs")),
    Case("M16c", "rank-stabilised LoRA and LoRA, exact sum",
         f"out = +1*rs -1*good  (space delta, head average, {ZERO})",
         run=(("merge", "-a", "rs", "good", "-p", "out", *DELTA, "--coefficients", "1", "-1"),),
         code=0, check=sum_of(rs=1.0, good=-1.0)),
    Case("M16d", "rank-stabilised LoRA and LoRA, in parameter space",
         f"rs and good: scaling at {LAYER.format(0, 'query')} differs; found 3 (lora_alpha 6, "
         "use_rslora True) in rs and 1.5 (lora_alpha 6, use_rslora False) in good, expected equal "
         f"values; {EQUAL}",
         run=(("merge", "-a", "rs", "good", "-p", "out"),)),
    Case("M23", "NaN in one module, every program",
         f"bad/{WEIGHTS}: tensor '...' is not finite; found 1 NaN or infinite of 128 values, "
         "expected finite values; the run that made it diverged; use an earlier checkpoint",
         d.put(float("nan")), header=False),
    Case("M24", "modules of two base models",
         "... and ...: base fingerprint differs; found ... in ... and ... in ..., expected equal "
         "values; use modules of one base model, or --allow_base_mismatch if these are the same "
         "weights",
         d.record(base={"name": "base", "fingerprint": "0" * 64, "model_type": "roberta",
                        "hidden_size": 32}),
         run=(TWO, (*TWO, *DELTA),
              ("compose", "a - b", "--module", "a=good", "--module", "b=bad", "-p", "out"))),
    Case("M26", "one layer of another rank (rank_pattern), with a uniform module",
         f"good and late: rank r at {LAYER.format(1, 'value')} differs; found 4 in good and 2 in "
         f"late, expected equal values; {EQUAL}",
         run=(("merge", "-a", "good", "late", "-p", "out"),)),
    Case("M26b", "one layer of another rank, alone, saved and loaded again",
         "out = +1*late  (space parameter, head average, error against sum c_i dW_i: 0)",
         run=(("merge", "-a", "late", "-p", "out"),), code=0, check=same_bits("late")),
    Case("M26c", "one layer of another rank, exact sum with a uniform module",
         f"out = +0.5*good +0.5*late  (space delta, head average, {ZERO})",
         run=(("merge", "-a", "good", "late", "-p", "out", *DELTA),), code=0,
         check=sum_of(good=0.5, late=0.5)),
    Case("M27", "one layer under two names, of a classifier and of its bare model",
         f"good and bad: name the same layers in two ways; found {LAYER.format(1, 'query')} in "
         "good and encoder.layer.1.attention.self.query in bad, expected one way, that of the "
         "model they will be used with; give bad the prefix (pem convert IN OUT --prefix roberta)",
         d.renamed(lambda name: name.replace("model.roberta.", "model.")),
         run=(TWO, (*TWO, *DELTA), (*TWO, "-w", "ties"),
              ("compose", "good - bad", "--module", "good=good", "--module", "bad=bad",
               "-p", "out"))),
    Case("M28", "updates that point in opposite directions, mean on the sphere",
         f"{LAYER.format(0, 'query')}: the updates point in opposite directions: no direction lies "
         "between them; use another method, or leave a module out",
         opposite, run=((*TWO, "-w", "slerp"), (*TWO, "-w", "karcher"))),
    Case("M29", "whole models, a coefficient beyond float32",
         "m1: roberta...: the sum is too large for float32; found coefficient 1e+39, expected "
         "finite numbers; choose smaller coefficients",
         run=(("merge", "-a", "m1", "m2", "-p", "out", "--full_merge", "-m", "base",
               "--coefficients", "1e39", "1"),)),
)  # fmt: skip
