"""Grades from 1 to 10 in what a grader says. A number counts only where the reply says it is one.

A grade is the whole reply, or its first or last line ("8", "**8,5**", "A: 8, B: 7"); a number with
the scale behind it ("8/10", "8 out of 10"); one after a word for it ("Grade: 8") or after a verb of
giving ("I would give it an 8."). Where several stand there they must agree, unless one is called
final or overall. Ranges ("7-8", "between 7 and 8"), other scales ("4/5", "80 %"), bounds ("at least
7") and numbers of anything else ("There are 3 things to check") are no grades.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LOWEST, HIGHEST = 1.0, 10.0
Grades = tuple[float, ...]

# The scale itself: "on a scale of 1-10", "(1 to 10)", "from 1 to 10"; and "between 7 and 8".
_ENDS = r"1\s*(?:-|\N{EN DASH}|to|\.\.)\s*10"
SCALE = re.compile(
    rf"\(?\s*\b(?:on|using)\s+(?:a|the)\s+scale\s+(?:of|from)?\s*{_ENDS}\s*\)?"
    rf"|[(\[]\s*(?:scale\s*:?\s*|from\s+)?{_ENDS}\s*[)\]]|\bfrom\s+{_ENDS}\b|\bscale\s+of\s+{_ENDS}\b"
    r"|\bbetween\s+\d[\d.,/]*\s+and\s+\d[\d.,]*(?:\s*/\s*10)?",
    re.IGNORECASE,
)
OUT_OF_TEN = re.compile(
    r"\s*(?:/|\bout\s+of\b|\bof\b)\s*(?:10(?:\.0)?(?![\w.,]*\d)|ten\b)", re.IGNORECASE
)
TEN = "\N{FRACTION SLASH}"  # stands for "out of 10" behind a number
# A number that is no part of another one, of a range, of another scale or of a word.
NUMBER = (
    r"(?<![\w.,<>~+\N{MINUS SIGN}-])(?<![<>]=)(?<![<>]= )(?<![<>] )(?<!\bto )(?<!\bor )"
    r"(?<!\bthan )(?<!\bleast )(?<!\bmost )(?<!\bnot )(?<!\babove )(?<!\bbelow )"
    r"(\d{1,2}(?:\.\d+)?)(?![\w%+])(?![.,]\d)(?!\s*(?:%|percent\b|stars?\b|,?\s*(?:maybe|perhaps)\b))"
    rf"(?!{TEN}?\s*(?:[-~/\u2013\u2014\u2192]|->|to|or|out\s+of)\s*\d)"  # dashes, an arrow
)
ONE = re.compile(rf"{NUMBER}{TEN}?")
# What may follow a grade within a sentence: not the noun that a count would have.
TAIL = (
    rf"{TEN}?(?:(?=\s*(?:$|[.,;:!()\[\]{{}}\"'|\n\u2014]|-\s|(?:because|for|as|since|overall)\b))"
    r"|\s*points(?=\s*(?:$|[.,;!)\n])))"
)
WORDS = r"(?:grade|score|rating|mark|evaluation|assessment|verdict|helpfulness)"
BETWEEN = r"[\s:=\"'>\])|]*(?:\bis\b|\bof\b|\bwould\s+be\b)?[\s:=\"'>(\[|]*(?:\ban?\b)?\s*"
LABELLED = re.compile(rf"\b{WORDS}\b{BETWEEN}{NUMBER}{TAIL}", re.IGNORECASE)
FINAL = re.compile(
    rf"\b(?:final|overall|total)\b[\s:]*(?:{WORDS}|answer)?\b{BETWEEN}{NUMBER}{TAIL}", re.IGNORECASE
)
GIVEN = re.compile(
    r"\b(?:give|giving|rate|grade|score|award|assign|deserves?|earns?|gets?|merits?|receives?)\b"
    rf"[^.\d\n]{{0,40}}?{NUMBER}{TAIL}",
    re.IGNORECASE,
)
# "A: 8", "Answer A gets 8", "1) 8": the first of two and, likewise, the second.
LINK = r"[\s:=\"'.)\]>(-]*(?:(?:is|gets|of|grade|score|rating|receives|would\s+be)[\s:=]*)*"
FIRST = re.compile(
    rf"(?:\b(?:A|a(?=[\s\"']*[:=]))\b|^\s*1[.)]\s|\b(?i:answer\s+1)\b){LINK}{NUMBER}", re.MULTILINE
)
SECOND = re.compile(
    rf"(?:\b(?:B|b(?=[\s\"']*[:=]))\b|^\s*2[.)]\s|\b(?i:answer\s+2)\b){LINK}{NUMBER}", re.MULTILINE
)
# What stands before or behind a grade that is the whole of what is said.
LEADING = re.compile(
    rf"^\W*(?:(?:the\s+)?(?:answer|result)\s*(?::|=|\bis\b)|it(?:'s|\s+is)\s+an?\b"
    rf"|(?:i(?:'d|\s+would)\s+say)\b(?:\s+an?\b)?)?\s*{NUMBER}{TEN}?\s*(?:points?\b)?"
    rf"(?=[\s.!]*$|\s+\([^()]*\)[\s.!]*$|\s+[-\N{{EN DASH}}\N{{EM DASH}}]\s+[^.\d]*[.!]?\s*$"
    rf"|,\s*(?:because|as|since|for)\b)",
    re.IGNORECASE,
)
PAIR = re.compile(
    rf"{NUMBER}{TEN}?[\])}}]*(?:\s*[,;|&]\s*|\s+(?:and|vs\.?|versus)\s+|\s+)"
    rf"[\[({{]*{NUMBER}{TEN}?"
)
BEFORE_TWO = re.compile(r"^(?:grades?|scores?|ratings?|verdict)\s*[:=]\s*", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
NOISE = re.compile(r"</?\w+>|\\boxed|\\text|[*_`$#]+")
EDGES = " \t.!:;,\"'()[]{}>\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"


def grades_of(reply: str, count: int) -> list[float] | None:
    """The grade, or the two grades, of a reply; None where it does not say them plainly."""
    plain = NOISE.sub(" ", BOXED.sub(r" \1 ", reply))
    # "8,5" may be one number or two: the reading that gives as many grades as were asked for.
    comma = re.compile(r"(?<![\d.,])(\d{1,2}),(\d{1,2})(?![\d.]|,\d)")
    two = re.sub(r"(?<=\.\d),(?=\d)", ", ", comma.sub(r"\1, \2", plain))
    for text in dict.fromkeys((comma.sub(r"\1.\2", plain), two)):
        found = _found(OUT_OF_TEN.sub(TEN, SCALE.sub(" ", text)).strip(), count)
        if found is not None:
            good = all(LOWEST <= grade <= HIGHEST for grade in found)
            return list(found) if good else None
    return None


def _found(text: str, count: int) -> Grades | None:
    """What all candidates agree on, those that are called final before all others."""
    tiers = [_final(text), _single(text)] if count == 1 else [_pairs(text)]
    for tier in tiers:
        candidates = set(tier)
        if candidates:
            return candidates.pop() if len(candidates) == 1 else None
    return None


def _final(text: str) -> Iterator[Grades]:
    yield from ((float(number),) for number in FINAL.findall(text))


def _single(text: str) -> Iterator[Grades]:
    lines = _lines(text)
    for line in (lines[0], lines[-1]):
        if match := ONE.fullmatch(line):
            yield (float(match[1]),)
    for match in ONE.finditer(text):
        if match[0].endswith(TEN):
            yield (float(match[1]),)
    for pattern in (LABELLED, GIVEN, LEADING):
        yield from ((float(number),) for number in pattern.findall(text))


def _pairs(text: str) -> Iterator[Grades]:
    firsts, seconds = FIRST.findall(text), SECOND.findall(text)
    if firsts and seconds:
        yield from ((float(a), float(b)) for a in firsts for b in seconds)
        return
    lines = _lines(text)
    for line in (", ".join(lines), lines[0], lines[-1]):
        if match := PAIR.fullmatch(BEFORE_TWO.sub("", line)):
            yield (float(match[1]), float(match[2]))


def _lines(text: str) -> list[str]:
    """The lines that say something, without bullets and marks around them."""
    lines = [line.strip(EDGES).removeprefix("- ").strip(EDGES) for line in text.splitlines()]
    return [line for line in lines if line] or [""]
