"""One module means one change of the weights, whatever does it: every way against live PEFT."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("peft")
import one_meaning as om

EVERY = frozenset(om.WAYS)
CONVERT, EXTRACT = frozenset({"convert"}), frozenset({"extract"})
FOLDS = frozenset({"fold", "fold, its own class", "extract"})
# What may be refused: the sentence, the requests, the ways, and (if not all) the models.
REFUSALS: list[tuple[str, str, frozenset[str], str]] = [
    ("DoRA .* cannot be represented", "dora", EVERY, ""),
    ("trained biases cannot be represented", "bias", EVERY, ""),
    ("LoRA on an embedding cannot be represented", "on the embedding", EVERY, ""),
    ("LoRA on bare parameters", "all linear.*", EVERY, "mixtral"),
    ("convolution layers cannot be represented", "patches", EVERY, "vit"),
    ("adapter-transformers layout (cannot represent|does not cover)", ".*", CONVERT, ""),
    ("tensors differ that the module cannot hold", ".*(saved|head|on the).*", EXTRACT, ""),
    ("no linear layer to extract", "on the (output|head).*", EXTRACT, ""),
    # a tuned model whose tied weights differ, beside a base that stores them once
    ("does not fit the base", "(ia3 )?(saved|on the).*", EXTRACT, ""),
    # transformers renames what these files hold when it loads them
    ("its class renames what the file holds", ".*", FOLDS, "vit|vit to gpt2|mixtral"),
]  # fmt: skip


def allowed(v: om.Verdict) -> bool:
    return any(
        re.search(said, v.said)
        and re.fullmatch(requests, v.request)
        and v.way in ways
        and (not models or re.fullmatch(models, v.model))
        for said, requests, ways, models in REFUSALS
    )


def judge(found: list[om.Verdict]) -> Counter[str]:
    """Count the verdicts; none may be wrong, and none refused for a reason that is not listed."""
    wrong = [v for v in found if v.word == "wrong"]
    refused = [v for v in found if v.word == "refused" and not allowed(v)]
    assert not wrong, "\n".join(map(str, wrong))
    assert not refused, "\n".join(map(str, refused))
    return Counter(v.word for v in found)


@pytest.mark.parametrize("name", om.BY_NAME)
def test_a_module_means_the_same_on_every_way(name: str, tmp_path: Path, one_thread: None) -> None:
    """Every eighth request of every model, so that each kind of request meets several models."""
    start = list(om.BY_NAME).index(name)
    chosen = list(om.requests(om.BY_NAME[name]))[start % 8 :: 8]
    counts = judge(list(om.verdicts(tmp_path, [name], lambda _, request: request in chosen)))
    assert counts["right"]


@pytest.mark.slow
@pytest.mark.parametrize("name", om.BY_NAME)
def test_every_cell(name: str, tmp_path: Path, one_thread: None) -> None:
    counts = judge(list(om.verdicts(tmp_path, [name])))
    assert counts["right"] > counts["refused"]
