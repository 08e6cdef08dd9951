"""A leaderboard: methods beside the exact sum, block by block, in a file that grows."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from pem_composition.errors import DataError
from pem_composition.report import leaderboard
from pem_composition.report.leaderboard import EXACT, OWN, Score

TASKS = ("rte", "mnli", "sst2", "qqp", "stsb")


def scored(values: dict[str, np.ndarray], run: str = "tiny lora 1") -> list[Score]:
    """Scores of methods on the first tasks."""
    return [
        Score(run, method, "c=0.3", task, "accuracy", float(x), 0.01, 300)
        for method, numbers in values.items()
        for task, x in zip(TASKS, numbers, strict=False)
    ]


@pytest.fixture
def runs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    exact = rng.uniform(0.4, 0.8, 15)
    return {
        OWN: exact + 0.05, EXACT: exact, "tsv": exact + rng.uniform(0.001, 0.02, 15),
        "ties": exact + rng.normal(0, 0.02, 15), "fisher": exact - 0.04,
    }  # fmt: skip


def three(values: dict[str, np.ndarray]) -> list[Score]:
    parts = ({m: x[i : i + 5] for m, x in values.items()} for i in (0, 5, 10))
    return [s for i, part in enumerate(parts) for s in scored(part, f"run {i}")]


def test_every_method_is_compared_with_the_exact_sum_of_its_block(runs):
    found = {s.method: s for s in leaderboard.standings(three(runs))}
    order = list(found)
    assert (order[0], order[-1]) == (OWN, "fisher")
    for method, values in runs.items():
        own, ways = found[method], values - runs[EXACT]
        assert own.blocks == 15 and own.mean == pytest.approx(values.mean())
        assert own.difference == pytest.approx(ways.mean())
        assert own.difference_standard_error == pytest.approx(stats.sem(ways), abs=1e-12)
        assert (own.better, own.worse) == ((ways > 0).sum(), (ways < 0).sum())
    merges = [m for m in runs if m != OWN]
    ranks = stats.rankdata([[-runs[m][i] for m in merges] for i in range(15)], axis=1).mean(axis=0)
    assert [found[m].rank for m in merges] == pytest.approx(ranks)
    assert found[OWN].rank is None and found[OWN].p is None and found[EXACT].p is None


def test_p_is_wilcoxons_by_the_rule_of_holm(runs):
    found = {s.method: s for s in leaderboard.standings(three(runs))}
    tested = ("tsv", "ties", "fisher")
    ways = {m: np.round(runs[m] - runs[EXACT], 12) for m in tested}  # equal ones are tied
    plain = {m: stats.wilcoxon(ways[m]).pvalue for m in tested}
    ordered = sorted(plain, key=plain.__getitem__)
    steps = [min(1.0, plain[m] * (3 - i)) for i, m in enumerate(ordered)]
    assert [found[m].p for m in ordered] == pytest.approx(list(np.maximum.accumulate(steps)))
    assert found["ties"].p > 0.05 > found["tsv"].p


def test_a_method_of_one_run_is_compared_there_and_ranked_where_all_stand(runs):
    own = scored({"mine": runs[EXACT][:5] + 0.1}, "run 0")
    found = {s.method: s for s in leaderboard.standings([*three(runs), *own])}
    assert (found["mine"].blocks, found["mine"].rank) == (5, 1.0)
    assert found["mine"].difference == pytest.approx(0.1)
    assert found["tsv"].blocks == 15 and found["tsv"].rank >= 2


def test_without_an_exact_sum_there_is_no_standing(runs):
    with pytest.raises(DataError, match="no run with an exact sum; found ties"):
        leaderboard.standings(scored({"ties": runs[EXACT][:5]}))
    apart = scored({"ties": runs[EXACT][:5]}, "another run")
    found = leaderboard.standings([*three(runs), *apart])
    assert {s.method: s.blocks for s in found} == dict.fromkeys(runs, 15)
    assert "15 |" in leaderboard.markdown([*three(runs), *apart])
    assert "a run; 3 runs." in leaderboard.markdown([*three(runs), *apart])


def test_equal_scores_are_no_difference(runs):
    (first, second) = leaderboard.standings(
        scored({EXACT: runs[EXACT], "cat": runs[EXACT] + 1e-15})
    )
    assert {first.p, second.p} == {None, 1.0} and first.rank == second.rank == 1.5


def test_a_file_is_read_as_it_was_written_and_a_run_again_takes_its_own_place(runs, tmp_path):
    file, scores = tmp_path / "methods.csv", three(runs)
    scores[0] = scores[0]._replace(standard_error=None, setting='a, "b"')
    leaderboard.write(file, scores)
    assert leaderboard.read(file) == scores
    assert leaderboard.read(tmp_path / "none.csv") == []
    again = [s._replace(score=0.5) for s in scores if s.run == "run 1" and s.method == "tsv"]
    more = leaderboard.extended(scores, again)
    assert len(more) == len(scores)
    assert {s.score for s in more if (s.run, s.method) == ("run 1", "tsv")} == {0.5}
    assert "| tsv | 15 |" in leaderboard.markdown(more)


def test_what_stands_in_the_file_is_what_was_compared(runs, tmp_path):
    """A third as 0.333333 beside a third of today was a win."""
    file, third = tmp_path / "methods.csv", np.full(5, 1 / 3)
    leaderboard.write(file, scored({EXACT: third}))
    _, found = leaderboard.standings([*leaderboard.read(file), *scored({"ties": third})])
    assert (found.better, found.worse, found.p) == (0, 0, 1.0)


def test_a_run_keeps_its_name_whatever_the_base_is_called(runs):
    old, new = scored({EXACT: runs[EXACT]}, "tiny lora 0a1b"), scored(runs, "snapshot lora 0a1b")
    assert {s.run for s in leaderboard.extended(old, new)} == {"tiny lora 0a1b"}


HEADER = ",".join(Score._fields) + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "no leaderboard; found a, b, expected the columns run, method"),
        (HEADER + "r,m,,t,acc,nan,0.1,3\n", "line 2: no score; found 'nan', '0.1', '3'"),
        (HEADER + "r,m,,t,acc,0.5,-0.1,3\n", "line 2: no score"),
        (HEADER + "r,m,,t,acc,1e308,,3\n", "line 2: no score"),
        (HEADER + "r,m,,t,acc,0.5,,many\n", "line 2: no score"),
        (
            HEADER + "r,m,,t,acc,0.5,,3\nr,n,,t,acc,0.5,,3\nr,m,c=1,t,acc,0.6,,3\n",
            "line 4: a second score of a method on a task of a run; found m, expected one, as in",
        ),
        (
            HEADER + "r,m,,t,acc,0.5,,3\nr,m,,u,f1,0.5,,3\nr,n,,t,perplexity,12,,3\n",
            "line 4: another metric than its block has; found perplexity, expected acc, as in",
        ),
        (HEADER + "r,m\n", "line 2: another number of values; found 2, expected 8"),
        (HEADER + "r,m,,t,acc,0.5,,3,mine\n", "line 2: another number of values; found 9"),
        (HEADER + 'r,"m' + "x" * 200_000, "no CSV file in UTF-8"),
        (HEADER.encode() + b"r,m\xe9thode,,t,acc,0.5,,3\n", "no CSV file in UTF-8"),
    ],
)
def test_another_file_is_refused(text, said, tmp_path):
    file = tmp_path / "methods.csv"
    data = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(said)):
        leaderboard.read(file)
    assert file.read_bytes() == data


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_files_of_other_systems_are_read(start, end, tmp_path):
    file = tmp_path / "methods.csv"
    assert leaderboard.read(file) == []
    file.write_bytes(b"")
    assert leaderboard.read(file) == []
    file.write_bytes((start + HEADER + "r,m,,t,acc,0.5,,3\n").replace("\n", end).encode())
    assert leaderboard.read(file) == [Score("r", "m", "", "t", "acc", 0.5, None, 3)]
