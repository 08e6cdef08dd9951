"""Which names are one parameter, told from names alone, against transformers' models."""

from __future__ import annotations

from pathlib import Path

import one_meaning as om
import pytest
import tiny

from pem_composition.checkpoint.files import read_json
from pem_composition.checkpoint.full import Weights
from pem_composition.checkpoint.tied import tied_names

MODELS = {**{n: (lambda n=n: om.built(n)) for n in om.BY_NAME}, **tiny.BUILDERS}


@pytest.mark.parametrize("name", MODELS)
def test_tied_names_are_what_transformers_ties(name: str, tmp_path: Path) -> None:
    """Every name that the file lacks, and no other, has the values of the stored one it shares."""
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    with Weights(tmp_path) as weights:
        stored = set(weights.infos)
    found = tied_names(read_json(tmp_path / "config.json", tmp_path), stored)
    live: dict[int, set[str]] = {}
    for n, p in model.named_parameters(remove_duplicate=False):
        live.setdefault(id(p), set()).add(n)
    lacking = {n for names in live.values() if names & stored for n in names - stored}
    assert {n for n in found if n not in stored} == lacking
    for copy, source in found.items():
        if copy not in stored:
            assert any({copy, source} <= names for names in live.values())
