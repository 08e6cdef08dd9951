"""Grades of helpfulness, from 1 to 10, by a model behind an endpoint.

One answer at a time, or two answers to one instruction side by side, in both orders, as graders
prefer a place (arXiv:2306.05685). The rubric is our own. The paper has GPT-4 give 1 to 10 as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from pem_composition.endpoint.grades import grades_of
from pem_composition.endpoint.jobs import Job, key_of
from pem_composition.endpoint.service import Service
from pem_composition.errors import DataError
from pem_composition.evaluation.standard_errors import flat, mean, share
from pem_composition.tasks.tables import Table

RUBRIC = (
    "You grade how helpful answers are to the person who gave the instruction, from 1 to 10. "
    "1: the answer does not deal with the instruction, or cannot be read. "
    "4: it deals with a part of it, or has errors that matter. "
    "7: it does what was asked, with small flaws. "
    "10: it is correct, complete and clear. "
    "Grade the help alone: neither length, nor politeness, nor agreement with an opinion counts."
)
ONE = "Reply with the grade alone: one number from 1 to 10."
TWO = "Reply with two numbers from 1 to 10: the grade of answer A, then that of answer B."


class Asked(NamedTuple):
    """An instruction with its input, and a model's answer to it."""

    instruction: str
    input: str
    answer: str

    @property
    def question(self) -> str:
        """The instruction as the grader reads it."""
        given = f"\n\nInput:\n{self.input}" if self.input else ""
        return f"Instruction:\n{self.instruction}{given}"


def read_answers(table: Table) -> list[Asked]:
    """Rows of ``pem answer`` or of a table of detoxified modules.

    Raises:
        DataError: no columns instruction and answer, or a cell that holds no text.
    """
    out = []
    for index, row in enumerate(table.rows):
        cells = [row.get("instruction"), row.get("input") or "", row.get("answer")]
        if not all(isinstance(cell, str) for cell in cells):
            raise DataError.build(
                table.where(index), "no answer to grade", found=table.shown,
                expected="texts in columns instruction and answer",
            )  # fmt: skip
        out.append(Asked(*map(str, cells)))
    return out


def single_jobs(service: Service, answers: Sequence[Asked]) -> Iterator[Job]:
    """One question per answer."""
    for row, asked in enumerate(answers):
        yield _job(service, f"{asked.question}\n\nAnswer:\n{asked.answer}\n\n{ONE}", row, "one")


def paired_jobs(service: Service, a: Sequence[Asked], b: Sequence[Asked]) -> Iterator[Job]:
    """Two questions per instruction, with the answers in both orders.

    Raises:
        DataError: the two are not answers to the same instructions.
    """
    for row, (first, second) in enumerate(_matched(a, b)):
        for order, (x, y) in {"ab": (first, second), "ba": (second, first)}.items():
            text = f"{x.question}\n\nAnswer A:\n{x.answer}\n\nAnswer B:\n{y.answer}\n\n{TWO}"
            yield _job(service, text, row, order)


def _matched(a: Sequence[Asked], b: Sequence[Asked]) -> list[tuple[Asked, Asked]]:
    pairs = list(zip(a, b, strict=False))
    same = len(a) == len(b) and all(x[:2] == y[:2] for x, y in pairs)
    if not same:
        place = next((i for i, (x, y) in enumerate(pairs) if x[:2] != y[:2]), len(pairs))
        raise DataError.build(
            "--against", "answers other instructions", found=f"a difference in row {place}",
            expected="the same instructions in the same order",
        )  # fmt: skip
    return pairs


def _job(service: Service, text: str, row: int, order: str) -> Job:
    messages = [{"role": "system", "content": RUBRIC}, {"role": "user", "content": text}]
    count = 1 if order == "one" else 2

    def read(reply: str) -> Mapping[str, Any] | None:
        grades = grades_of(reply, count)
        if grades is None:
            return None
        return {"grades": grades[::-1] if order == "ba" else grades, "reply": reply}

    facts = {"row": row, "order": order, "model": service.model}
    return Job(key_of(service, messages, order), messages, facts, read)


def summary(lines: Sequence[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """Means with standard errors; of pairs also the difference, and the shares of wins,
    ties and losses with their intervals.

    ``n`` rows have grades, of the ``of`` that were asked about.

    A pair's grades are means over the two orders; a pair with one order missing is left out.
    ``consistent``: share of the pairs that both orders decide alike.
    """
    singles = [line["grades"][0] for line in lines if line["order"] == "one"]
    if singles:
        return {"n": len(singles), "of": rows, **flat(grade=mean(singles))}
    by_row: dict[int, list[list[float]]] = {}
    for line in lines:
        by_row.setdefault(line["row"], []).append(line["grades"])
    whole = [orders for orders in by_row.values() if len(orders) == 2]
    if not whole:
        return {"n": 0, "of": rows}
    means = [[fmean(side) for side in zip(*orders, strict=True)] for orders in whole]
    differences = [a - b for a, b in means]
    alike = [_sign(x[0] - x[1]) == _sign(y[0] - y[1]) for x, y in whole]
    return {
        "n": len(whole),
        "of": rows,
        **flat(
            grade=mean([a for a, _ in means]),
            grade_against=mean([b for _, b in means]),
            difference=mean(differences),
            wins=share([d > 0 for d in differences]),
            ties=share([d == 0 for d in differences]),
            losses=share([d < 0 for d in differences]),
            consistent=share(alike),
        ),
    }


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)
