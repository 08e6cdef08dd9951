"""README.md of a composed module: a model card that the Hugging Face Hub accepts.

The front matter names the base, the library and tags; the text says what the module is, what it was
made of, how exact it is and how to make it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pem_composition.checkpoint.files import is_file, open_regular
from pem_composition.checkpoint.hub_name import HUB_NAME
from pem_composition.errors import CheckpointError
from pem_composition.record import SUM

if TYPE_CHECKING:
    from pem_composition.module import PEM
    from pem_composition.record import Source

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
LICENSE = re.compile(r"""license:\s*(["']?)([A-Za-z0-9][A-Za-z0-9.+-]*)\1\s*(#.*)?""")
UNKNOWN = "not stated"


def card(pem: PEM, title: str | None = None) -> str:
    """The text of README.md.

    Args:
        title: default: the module's name.
    """
    p = pem.provenance
    lines = ["---", *_front_matter(pem), "---", "", f"# {_plain(title or pem.name)}", ""]
    lines += [f"{_KINDS[pem.kind]}: `{_plain(str(pem))}`", ""]
    if p.space:
        lines += [
            f"Made in {p.space} space ({_plain(p.method or 'sum')}), "
            f"head: {p.head_policy or 'kept'}.",
            "",
        ]
    if p.sources:
        lines += ["| input | sha256 | licence |", "|---|---|---|", *map(_row, p.sources), ""]
    if p.certificate:
        lines += [
            f"Relative error against {_against(p.certificate.against)}: {p.certificate}.",
            "",
        ]
    lines += [*_heads(pem), *_usage(pem)]
    lines += [*(f"- {_plain(note)}" for note in p.notes), *([""] if p.notes else [])]
    if p.recipe:
        lines += ["Made again from its inputs and compared by `pem rebuild DIRECTORY`.", ""]
    return "\n".join([*lines, "Details and checksums: `pem.json`.", ""])


def _against(against: str) -> str:
    return "the exact sum of updates" if against == SUM else _plain(against)


_KINDS = {
    "lora": "A LoRA module",
    "ia3": "An (IA)^3 module",
    "full": "A fully fine-tuned model",
}


def _front_matter(pem: PEM) -> Iterator[str]:
    """YAML; every text is written as JSON, which YAML reads alike."""
    composed = pem.provenance.recipe is not None and len(pem.provenance.sources) > 1
    yield f"library_name: {json.dumps('transformers' if pem.kind == 'full' else 'peft')}"
    name = pem.base.name or ""
    if HUB_NAME.fullmatch(name) and not Path(name).exists():  # a local path is no name there
        yield f"base_model: {json.dumps(name)}"
        yield f"base_model_relation: {'adapter' if pem.kind != 'full' else 'finetune'}"
    stated = {s.license for s in pem.provenance.sources}
    if len(stated) == 1 and (common := stated.pop()) is not None:
        yield f"license: {json.dumps(common)}"
    yield f"tags: {json.dumps(['pem-composition', pem.kind, *(['merge'] if composed else [])])}"


def _row(source: Source) -> str:
    licence = source.license or UNKNOWN
    return f"| {_plain(source.name)} | `{source.sha256 or 'in memory'}` | {_plain(licence)} |"


def _heads(pem: PEM) -> list[str]:
    if not pem.heads:
        return []
    rows = [
        f"| {name} | `heads/{name}.safetensors` | {_plain(', '.join(head.info.labels)) or '-'} |"
        for name, head in pem.heads.items()
    ]
    lines = ["Heads kept beside the module, one per task (`pem evaluate --head NAME`):", ""]
    return [*lines, "| head | file | labels |", "|---|---|---|", *rows, ""]


def _usage(pem: PEM) -> list[str]:
    name = pem.base.name or ""
    shown = name if HUB_NAME.fullmatch(name) else Path(name).name  # a path is nobody's business
    base = f" of {_plain(shown)}" if shown else ""
    if pem.kind == "full":
        return ["Opens with transformers.", ""]
    return [f"Opens in plain PEFT: `PeftModel.from_pretrained(model, DIRECTORY)` on a model{base}.",
            ""]  # fmt: skip


def _plain(text: str) -> str:
    """One line without the characters that mean something in a Markdown table."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())


def license_of(folder: Path) -> str | None:
    """The ``license`` of a card's front matter, None where none is stated. No YAML is interpreted.

    Only a plain value on a line of its own between the two ``---`` counts.
    """
    path = folder / CARD
    if not is_file(path):
        return None
    try:
        with open_regular(path, folder) as file:
            text = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    except CheckpointError:  # a card decides nothing; a strange one is as good as none
        return None
    front = re.match(r"---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    for line in front[1].splitlines() if front else ():
        found = LICENSE.fullmatch(line)
        if found:
            return found[2].lower()
    return None
