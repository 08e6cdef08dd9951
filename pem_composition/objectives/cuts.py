"""What training rows lose where they are cut at --max_seq_length, in one line for the user."""

from __future__ import annotations

from collections.abc import Sequence

from pem_composition.tasks.data import Example

NAMED = 5  # rows


def cut_notes(
    examples: Sequence[Example],
    whole: Sequence[int],
    length: int,
    *,
    context: int | None,
    loses: str,
    without: Sequence[bool] = (),
) -> tuple[str, ...]:
    """Nothing where every row fits, else how many do not, which, and the length that keeps all.

    Args:
        whole: tokens of each row before the cut.
        length: where rows are cut.
        context: tokens that the model can read; None: any number.
        loses: what a cut row loses.
        without: which rows keep no token that is learned, and are left out.
    """
    cut = [n > length for n in whole]
    left_out = [i for i, lost in enumerate(without) if lost]
    if not any(cut) and not left_out:
        return ()
    dropped = set(left_out)
    shorter = [i for i, lost in enumerate(cut) if lost and i not in dropped]
    parts = []
    if left_out:
        parts.append(f"{len(left_out)} keep no token of the answer and are left out")
    if shorter:
        parts.append(f"{len(shorter)} lose {loses}")
    names = ", ".join(str(examples[i].row_id) for i in (left_out or shorter)[:NAMED])
    more = ", ..." if len(left_out or shorter) > NAMED else ""
    longest = max(whole)
    if context is not None and longest > context <= length:
        advice = "the model reads no more"
    elif context is not None and longest > context:
        fits = sum(n <= context for n in whole)
        advice = f"--max_seq_length {context}, the most that the model reads, keeps {fits} whole"
    else:
        advice = f"--max_seq_length {longest} keeps all"
    return (
        f"--max_seq_length {length}: of {len(whole)} training rows {' and '.join(parts)} "
        f"(rows {names}{more}); {advice}",
    )
