"""Instructions and their answers: rows of a file, and the template in which a model reads them.

A row has an instruction, perhaps an input to it, and an answer where it is learned or compared:

    instruction, input, output      as in Alpaca; input and output may be missing
    instruction, instances          as in Self-Instruct: one row per instance {input, output}
    prompt                          as in XSTest: an instruction alone

A template is a JSON file of two texts, and the words with which a next section would begin, where
an answer is cut off:

    {"with_input": "... {instruction} ... {input} ...", "without_input": "... {instruction} ...",
     "stop": ["###"]}

``sections`` is one of that kind in words of our own, with the headings of Alpaca; ``chat`` is the
tokenizer's chat template. A module trained with another wording (a published Alpaca-LoRA) needs
that wording in a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.errors import DataError
from pem_composition.same_texts import letters
from pem_composition.tasks import data
from pem_composition.tasks.document_rows import LANGUAGE
from pem_composition.tasks.glue import Task, plain
from pem_composition.tasks.prompts import load_json
from pem_composition.tasks.tables import Table
from pem_composition.tasks.tokens import Tokens, begun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION_COLUMNS = ("instruction", "prompt")
INPUT, OUTPUT, INSTANCES = "input", "output", "instances"
PLACEHOLDER = re.compile(r"\{(instruction|input)\}")
SHORTEST_SHARED = 20  # letters; shorter texts ("Yes.") are alike by chance
ALPACA = Task(
    "alpaca_cleaned", ("instruction", None), (), hub=("yahma/alpaca-cleaned", None),
    validation_splits=(),
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """How an instruction is written down for a model.

    Attributes:
        with_input, without_input: texts with {instruction} and {input}; empty for ``chat``.
        stop: what begins a next section: an answer ends before it.
    """

    name: str
    with_input: str = ""
    without_input: str = ""
    stop: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """True if the tokenizer's chat template writes the text, special tokens included."""
        return not self.without_input

    def content(self) -> dict[str, Any]:
        """What decides the text; part of a run's key."""
        if self.is_chat:
            return {"template": CHAT.name}
        return {"template": [self.with_input, self.without_input], "stop": list(self.stop)}

    def text(self, instruction: str, given: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the model reads before it answers; braces in the row's texts stand for themselves.

        Raises:
            DataError: ``chat``, and the tokenizer has no chat template.
        """
        if not self.is_chat:
            values = {"instruction": instruction, "input": given or ""}
            text = self.with_input if given else self.without_input
            return PLACEHOLDER.sub(lambda match: values[match[1]], text)
        if tokenizer.chat_template is None:
            raise DataError.build(
                "--template chat", "the tokenizer has no chat template",
                do=f"use --template {SECTIONS.name}, or a file",
            )  # fmt: skip
        asked = f"{instruction}\n\n{given}" if given else instruction
        turns = [{"role": "user", "content": asked}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def tokens(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
        """As the tokenizer begins a text; a chat template begins it by itself."""
        return [begun(tokenizer, text, special=not self.is_chat) for text in texts]

    def cut(self, text: str) -> str:
        """An answer without what follows it, and without white space around it."""
        for mark in self.stop:
            text = text.partition(mark)[0]
        return text.strip()


SECTIONS = Template(
    "sections",
    "Carry out the instruction with the input that belongs to it.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Carry out the instruction.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    ("###",),
)
CHAT = Template("chat")
TEMPLATES = {template.name: template for template in (SECTIONS, CHAT)}


def get_template(name: str | None = None) -> Template:
    """A template by name or from a JSON file; ``sections`` if none is named.

    Raises:
        DataError: no such name or file, or a file that is no template.
    """
    if name is None:
        return SECTIONS
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if path.suffix != ".json" and not path.is_file():
        raise DataError.build(
            "--template", "unknown", found=repr(name),
            expected=", ".join(TEMPLATES) + " or a JSON file",
        )  # fmt: skip
    return _read_template(path)


def _read_template(path: Path) -> Template:
    raw = load_json(path, "template")
    texts = {"with_input": ("{instruction}", "{input}"), "without_input": ("{instruction}",)}
    for key, needed in texts.items():
        text = raw.get(key)
        if not isinstance(text, str):
            raise DataError.build(
                path, f"no text '{key}'", found=", ".join(raw) or "no keys",
                expected="with_input, without_input and stop",
            )  # fmt: skip
        for placeholder in needed:
            if placeholder not in text:
                raise DataError.build(path, f"'{key}' lacks {placeholder}", do="add it")
    stop = raw.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(mark, str) and mark for mark in stop):
        raise DataError.build(
            path, "'stop' is no list of texts", found=json.dumps(stop), expected='such as ["###"]'
        )
    return Template(path.stem, raw["with_input"], raw["without_input"], tuple(stop))


# --- rows ---------------------------------------------------------------------------------------


def load_instructions(task_name: str | None, files: data.RowFiles) -> data.TaskData:
    """Rows with answers, from files or of ``alpaca_cleaned`` by hub name; limits take the first.

    Raises:
        DataError: no such file or task, or rows without instruction or answer.
    """
    if task_name is not None and plain(task_name) != plain(ALPACA.name):
        raise DataError.build(
            "--task_name", "no set of instructions", found=task_name,
            expected=f"{ALPACA.name}, or --train_file",
        )  # fmt: skip
    tables = files.tables(ALPACA if task_name else LANGUAGE)
    notes: list[str] = []
    rows = {s: answered(table, notes)[: files.first(s)] for s, table in tables.items()}
    return data.TaskData(LANGUAGE, rows, {s: t.name for s, t in tables.items()}, tuple(notes))


def answered(table: Table, notes: list[str]) -> tuple[data.Example, ...]:
    """The rows that have an answer; a note says how many have an empty one.

    Raises:
        DataError: no row has one.
    """
    examples = examples_of(table)
    if all(example.label is None for example in examples):
        raise DataError.build(
            table.name, "no answers", found=table.shown,
            expected=f"columns instruction, {INPUT} (may be empty) and {OUTPUT}",
        )  # fmt: skip
    kept = tuple(example for example in examples if str(example.label or "").strip())
    if not kept:
        raise DataError.build(table.name, "every answer is empty")
    if len(kept) < len(examples):
        notes.append(f"{table.name}: {len(examples) - len(kept)} rows without an answer left out")
    return kept


def examples_of(table: Table) -> list[data.Example]:
    """Instruction as text, input as text_pair (None if empty), answer as label (None if missing).

    Raises:
        DataError: no column of instructions, or a cell that is no text.
    """
    return [example for index in range(len(table.rows)) for example in _row(table, index)]


def _row(table: Table, index: int) -> list[data.Example]:
    column = table.column(INSTRUCTION_COLUMNS, "instructions")
    row = table.rows[index]
    instruction = _text(table, index, column, row[column])
    if not instruction.strip():
        raise DataError.build(table.where(index), f"column '{column}' is empty")
    examples = []
    for instance in _instances(table, index):
        given = _text(table, index, INPUT, instance.get(INPUT) or "")
        answer = instance.get(OUTPUT)
        label = None if answer is None else _text(table, index, OUTPUT, answer)
        pair = given if given.strip() else None
        examples.append(data.Example(instruction, pair, label, index, row))
    return examples


def _instances(table: Table, index: int) -> Sequence[dict[str, Any]]:
    """The inputs and outputs of a row: its own, or those in its list ``instances``."""
    row = table.rows[index]
    if INSTANCES not in table.columns:
        return [row]
    instances = row[INSTANCES]
    listed = isinstance(instances, list) and instances
    if not listed or not all(isinstance(instance, dict) for instance in instances):
        raise DataError.build(
            table.where(index),
            f"'{INSTANCES}' is no list of objects",
            found=type(instances).__name__,
        )
    return list(instances)


def _text(table: Table, index: int, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError.build(
            table.where(index), f"column '{column}' is not text", found=type(value).__name__,
            expected="a string",
        )  # fmt: skip
    return value


# --- overlap ------------------------------------------------------------------------------------


def has_instructions(table: Table) -> bool:
    """True for a table of instructions, False for one of comments."""
    return any(column in table.columns for column in INSTRUCTION_COLUMNS)


def fingerprints(table: Table, shortest: int = SHORTEST_SHARED) -> list[frozenset[str]]:
    """The texts of each row that two files must not share, up to case, space and punctuation.

    The instruction with its input, the answer, and the text of a comment.

    Args:
        shortest: letters of the texts that count: instructions and answers are short by chance.
    """
    if has_instructions(table):
        texts = [
            [t for e in _row(table, i) for t in (e.text + (e.text_pair or ""), str(e.label or ""))]
            for i in range(len(table.rows))
        ]
    else:
        texts = [[text] for text in data.texts_of(table, LANGUAGE)]
    keys = [[letters(text) for text in row] for row in texts]
    return [frozenset(k for k in row if len(k) >= shortest) for row in keys]
