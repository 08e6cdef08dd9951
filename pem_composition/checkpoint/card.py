"""README.md of a module: a model card that the Hugging Face Hub accepts. It writes every card.

The front matter names the base, the library and tags; the text says what the module is, what it was
made of or trained with, how exact it is and how to make it again. A card for the hub has more:
scores, data sets, code that loads the module by its name there, and whom to cite.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.labels import error_text
from pem_composition.checkpoint.content import CARD, LAYOUTS, PEFT, Layout
from pem_composition.checkpoint.hub_name import HUB_NAME
from pem_composition.errors import CheckpointError
from pem_composition.record import SUM, purposes
from pem_composition.safe_files import is_file, open_regular

if TYPE_CHECKING:
    from pem_composition.module import PEM

MAX_CARD_BYTES = 1 << 20
LICENSE = re.compile(r"""license:\s*(["']?)([A-Za-z0-9][A-Za-z0-9.+-]*)\1\s*(#.*)?""")
UNKNOWN = "not stated"
# The class of transformers that opens the base, by PEFT's name of the task.
MODEL_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
CITATION = [
    "## Citation",
    "",
    "```bibtex",
    "@inproceedings{zhang2023composing,",
    "  title = {Composing Parameter-Efficient Modules with Arithmetic Operations},",
    "  author = {Zhang, Jinghan and Chen, Shiqi and Liu, Junteng and He, Junxian},",
    "  booktitle = {Advances in Neural Information Processing Systems},",
    "  year = {2023},",
    "  url = {https://arxiv.org/abs/2306.14870}",
    "}",
    "```",
    "",
]


@dataclass(frozen=True)
class Publication:
    """What a card on the hub says beyond the module itself.

    Attributes:
        repository: ``org/name`` on the hub.
        task: what ``scores`` measure, None where that is not recorded.
        dataset: the task's data set on the hub and its configuration.
        scores: metric -> value, of the rows that evaluations report.
    """

    repository: str
    task: str | None = None
    dataset: tuple[str, str | None] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


def card(
    pem: PEM,
    title: str | None = None,
    *,
    layout: str | None = None,
    publication: Publication | None = None,
) -> str:
    """The text of README.md.

    Args:
        title: default: the module's name.
        layout: the one it is written in, see ``content.LAYOUTS``; default: peft.
        publication: for the hub.
    """
    p = pem.provenance
    written = LAYOUTS.get(layout or PEFT.name, PEFT)
    front = _front_matter(pem, written=written, publication=publication)
    lines = ["---", *front, "---", "", f"# {_plain(title or pem.name)}", ""]
    lines += [f"{_KINDS[pem.kind]}: `{_plain(str(pem))}`", ""]
    stated = purposes(p.notes) if p.space is None else {}
    lines += [line for text in stated.values() for line in (f"**Purpose:** {_plain(text)}.", "")]
    if p.space:
        lines += [
            f"Made in {p.space} space ({_plain(p.method or 'sum')}), "
            f"head: {p.head_policy or 'kept'}.",
            "",
        ]
    if p.sources:
        lines += ["| input | sha256 | licence |", "|---|---|---|"]
        for s in p.sources:
            licence = _plain(s.license or UNKNOWN)
            lines.append(f"| {_plain(s.name)} | `{s.sha256 or 'in memory'}` | {licence} |")
        lines.append("")
    if p.certificate:
        against = p.certificate.against
        exact = "the exact sum of updates" if against == SUM else _plain(against)
        lines += [f"Relative error against {exact}: {error_text(p)}.", ""]
    lines += [*_heads(pem), *_usage(pem, written=written, publication=publication)]
    lines += [*(f"- {_plain(note)}" for note in p.notes), *([""] if p.notes else [])]
    if p.space is None:
        lines += _training(p.training)
    if p.recipe:
        lines += ["Made again from its inputs and compared by `pem rebuild DIRECTORY`.", ""]
    if publication:
        lines += CITATION
    return "\n".join([*lines, "Details and checksums: `pem.json`.", ""])


_KINDS = {
    "lora": "A LoRA module",
    "ia3": "An (IA)^3 module",
    "full": "A fully fine-tuned model",
}


def _front_matter(pem: PEM, *, written: Layout, publication: Publication | None) -> Iterator[str]:
    """YAML; every text is written as JSON, which YAML reads alike."""
    composed = pem.provenance.recipe is not None and len(pem.provenance.sources) > 1
    library = "transformers" if pem.kind == "full" else written.name
    yield f"library_name: {json.dumps(library)}"
    if name := _hub_base(pem):
        yield f"base_model: {json.dumps(name)}"
        yield f"base_model_relation: {'adapter' if pem.kind != 'full' else 'finetune'}"
    stated = {s.license for s in pem.provenance.sources}
    if len(stated) == 1 and (common := stated.pop()) is not None:
        yield f"license: {json.dumps(common)}"
    if publication and publication.dataset:
        yield f"datasets: {json.dumps([publication.dataset[0]])}"
    yield f"tags: {json.dumps(['pem-composition', pem.kind, *(['merge'] if composed else [])])}"
    if publication and publication.task and publication.scores:
        yield f"model-index: {json.dumps(_model_index(pem, publication))}"


def _hub_base(pem: PEM) -> str | None:
    """The base's name on the hub; None for a local path, which is no name there."""
    name = pem.base.name or ""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def _model_index(pem: PEM, told: Publication) -> list[dict[str, Any]]:
    """The scores, as the hub lists them."""
    name, config = told.dataset or (str(told.task), None)
    classifies = bool(pem.head_names)
    result = {
        "task": {"type": "text-classification" if classifies else "text-generation"},
        "dataset": {"name": told.task, "type": name, **({"config": config} if config else {})},
        "metrics": [{"type": metric, "value": value} for metric, value in told.scores.items()],
    }
    return [{"name": pem.name, "results": [result]}]


def _heads(pem: PEM) -> list[str]:
    if not pem.heads:
        return []
    rows = [
        f"| {name} | `heads/{name}.safetensors` | {_plain(', '.join(head.info.labels)) or '-'} |"
        for name, head in pem.heads.items()
    ]
    lines = ["Heads kept beside the module, one per task (`pem evaluate --head NAME`):", ""]
    return [*lines, "| head | file | labels |", "|---|---|---|", *rows, ""]


def _usage(pem: PEM, *, written: Layout, publication: Publication | None) -> list[str]:
    """How the module is opened; for the hub, as code."""
    name = pem.base.name or ""
    shown = name if HUB_NAME.fullmatch(name) else Path(name).name  # a path is nobody's business
    base = f" of {_plain(shown)}" if shown else ""
    if pem.kind == "full":
        return ["Opens with transformers.", ""]
    if written != PEFT:
        text = f"In the layout of {written.program}, for a model{base}. PEFT does not read it; "
        return [f"{text}`pem convert DIRECTORY OUT --format peft` writes it for PEFT.", ""]
    task, where = pem.config.extra.get("task_type"), "DIRECTORY"
    if publication is not None:
        where = json.dumps(publication.repository)
    own = " with such a head" if pem.head_names and task is None else ""
    if publication is None or own:
        return [f"Opens in plain PEFT: `PeftModel.from_pretrained(model, {where})` on a model"
                f"{base}{own}.", ""]  # fmt: skip
    opened = MODEL_CLASSES.get(str(task), "AutoModel")
    outputs = f", num_labels={_outputs(pem)}" if task in ("SEQ_CLS", "TOKEN_CLS") else ""
    return [
        f"Opens in plain PEFT, on a model{base}:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {opened}",
        "",
        f"base = {json.dumps(_hub_base(pem) or 'the base model')}",
        f"model = {opened}.from_pretrained(base{outputs})",
        f"model = PeftModel.from_pretrained(model, {where})",
        "```",
        "",
        f"In sums with other modules: `pem_composition.load({where})`.",
        "",
    ]


def _outputs(pem: PEM) -> int:
    """How many values the head answers with: its last layer is its narrowest."""
    labels = pem.head.labels if pem.head else ()
    return len(labels) or min(int(t.shape[0]) for t in pem.head_tensors().values())


def _training(training: Mapping[str, Any]) -> list[str]:
    """Scores of a training run and the flags that decided them, as tables."""
    scores, flags = training.get("scores") or {}, training.get("flags") or {}
    rows = [f"| {k} | {_value(v)} |" for k, v in scores.items() if not isinstance(v, Mapping)]
    lines = ["| result | value |", "|---|---|", *rows, ""] if rows else []
    decide = [(k, flags.get(k)) for k in training.get("decide") or ()]
    rows = [f"| {_plain(k)} | {_value(v)} |" for k, v in decide if v is not None]
    return [*lines, *(["| flag | value |", "|---|---|", *rows, ""] if rows else [])]


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _plain(str(value))


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
