"""Model cards: the front matter as the Hub's own library reads it, licences of inputs, the text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from pem_composition import load
from pem_composition.checkpoint.card import license_of
from pem_composition.config import BaseIdentity, LoraConfig
from pem_composition.module import PEM, combine


def module(base: str | None = "org/base") -> PEM:
    tensors = {"x.q.lora_A": torch.ones(2, 3), "x.q.lora_B": torch.ones(4, 2)}
    return PEM(tensors, LoraConfig(2, 2, ("q",)), BaseIdentity(base), "m")


def state_license(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(f"---\n{text}\n---\n\n# A module\n")


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        module().save(folder)
    return folders


def card_of(inputs: list[Path], out: Path) -> ModelCard:
    combine([load(p) for p in inputs], [0.3, 0.7]).save(out)
    return ModelCard.load(out / "README.md")


def test_the_hub_reads_base_library_tags_and_relation(inputs: list[Path], tmp_path: Path) -> None:
    card = card_of(inputs, tmp_path / "m")
    data = card.data.to_dict()
    assert data == {
        "library_name": "peft",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["pem-composition", "lora", "merge"],
    }
    assert "# m\n" in card.text
    assert "`+0.3*a +0.7*b`" in card.text
    assert "| not stated |" in card.text
    assert "`pem rebuild DIRECTORY`" in card.text


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(("mit", "mit"), "mit"), (("mit", "apache-2.0"), None), (("mit", None), None)],
)
def test_a_licence_is_taken_over_where_all_inputs_state_it(
    stated: tuple[str | None, str | None], expected: str | None, inputs: list[Path], tmp_path: Path
) -> None:
    for folder, licence in zip(inputs, stated, strict=True):
        if licence:
            state_license(folder, f"license: {licence}")
    card = card_of(inputs, tmp_path / "m")
    assert card.data.license == expected
    for licence in stated:
        assert f"| {licence or 'not stated'} |" in card.text
    sources = load(tmp_path / "m").provenance.sources
    assert [s.license for s in sources] == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("license: MIT", "mit"),
        ('license: "cc-by-4.0"  # as the data', "cc-by-4.0"),
        ("tags:\n- license: mit", None),
        ("license:\n- mit\n- other", None),
        ("license: [mit]", None),
        ("license: !!python/object:os.system x", None),
        ("license_name: own", None),
    ],
)
def test_only_a_plain_licence_counts(text: str, expected: str | None, tmp_path: Path) -> None:
    state_license(tmp_path, text)
    assert license_of(tmp_path) == expected


def test_a_card_without_front_matter_states_nothing(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_text("# Title\n\nlicense: mit\n")
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("/etc/hostname")
    assert license_of(tmp_path) is None


@pytest.mark.parametrize("name", ["/home/someone/models/base", "./base", "a/b/c", None])
def test_a_local_base_is_no_name_for_the_hub(name: str | None, tmp_path: Path) -> None:
    module(name).save(tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.base_model is None
    assert "someone" not in card.content


def test_a_base_that_is_a_folder_here_is_no_name_for_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    module().save(tmp_path / "m")
    assert ModelCard.load(tmp_path / "m" / "README.md").data.base_model is None


def test_names_and_notes_cannot_break_the_card(tmp_path: Path) -> None:
    strange = replace(module('x"\n---\nlicense: mit'), name="a|b`c\n# d")
    strange.save(tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.license is None
    assert card.data.tags == ["pem-composition", "lora"]
