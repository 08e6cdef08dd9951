"""Classification as text: what a text-to-text model reads, and the words it answers with.

The templates and words of RTE and MNLI are the paper's (section 4.2 of arXiv 2306.14870); reviews
are read as they are and answered with negative or positive, as in its section on domain transfer.
The other GLUE tasks are worded in the same spirit. A template of one's own is a JSON file:

    {"template": "Does {premise} entail {hypothesis}?", "answers": {"entailment": "Yes", ...}}

Placeholders are the task's text columns, or {text} and {text_pair}.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.errors import DataError, close_match
from pem_composition.tasks.data import Example
from pem_composition.tasks.glue import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = re.compile(r"\{(\w+)\}")
FIRST, SECOND = "text", "text_pair"
LARGEST_FILE = 1 << 20  # bytes; a template is a few lines


@dataclass(frozen=True)
class Prompt:
    """A template and the answer of each class.

    Attributes:
        answers: one word or phrase per class, in the order of the task's labels; for a regression
            task the numbers that can be answered, in rising order.
    """

    name: str
    template: str
    answers: tuple[str, ...]

    def source(self, task: Task, example: Example) -> str:
        """What the model reads: the template with the example's texts.

        A text is inserted as it is: braces in it are not placeholders.
        """
        values = {FIRST: example.text, SECOND: example.text_pair or ""}
        values |= dict(zip(_columns(task), (example.text, example.text_pair or ""), strict=False))
        return PLACEHOLDER.sub(lambda match: values[match[1]], self.template)

    def answer_of(self, task: Task, label: float) -> int:
        """Number of the answer that stands for a label: its class, or the nearest number."""
        if not task.regression:
            return int(label)
        return min(range(len(self.answers)), key=lambda i: abs(float(self.answers[i]) - label))

    def target(self, task: Task, example: Example) -> str:
        """What the model answers.

        Raises:
            DataError: the example has no label.
        """
        if example.label is None:
            raise DataError.build(
                f"row {example.row_id}", "has no label, so no answer", expected=task.accepted()
            )
        return self.answers[self.answer_of(task, example.label)]


YES_NO = " Please answer either yes or no."
MNLI = 'Does "{premise}" imply that "{hypothesis}"? Please answer yes, no or maybe.'
STSB_NUMBERS = tuple(f"{fifth / 5:.1f}" for fifth in range(26))

PROMPTS: dict[str, Prompt] = {
    prompt.name: prompt
    for prompt in (
        Prompt("rte", 'Does "{sentence1}" imply that "{sentence2}"?' + YES_NO, ("Yes", "No")),
        Prompt("mnli", MNLI, ("Yes", "Maybe", "No")),
        Prompt("snli", MNLI, ("Yes", "Maybe", "No")),
        Prompt("wnli", 'Does "{sentence1}" imply that "{sentence2}"?' + YES_NO, ("No", "Yes")),
        Prompt("cola", 'Is "{sentence}" a grammatical English sentence?' + YES_NO, ("No", "Yes")),
        Prompt(
            "mrpc", 'Does "{sentence1}" mean the same as "{sentence2}"?' + YES_NO, ("No", "Yes")
        ),
        Prompt("qqp", 'Does "{question1}" ask the same as "{question2}"?' + YES_NO, ("No", "Yes")),
        Prompt(
            "qnli", 'Does "{sentence}" answer the question "{question}"?' + YES_NO, ("Yes", "No")
        ),
        Prompt(
            "sst2",
            "Is the following review positive or negative? {sentence}",
            ("negative", "positive"),
        ),
        Prompt(
            "stsb",
            'How similar in meaning are "{sentence1}" and "{sentence2}", from 0.0 to 5.0?',
            STSB_NUMBERS,
        ),
        Prompt("polarity", "{text}", ("negative", "positive")),
    )
}
POLARITY = PROMPTS["polarity"]


def get_prompt(task: Task, prompt: str | None = None) -> Prompt:
    """The prompt of a task: its own, another by name, or one from a JSON file.

    Raises:
        DataError: no such name or file; a file that is no prompt; a placeholder that is no text
            column of the task; a class without an answer, an answer for no class, two alike.
    """
    if prompt is None:
        chosen = PROMPTS.get(task.name) or (POLARITY if task.labels == POLARITY.answers else None)
        if chosen is None:
            raise DataError.build(
                f"task {task.name}", "has no prompt of its own", expected="--prompt NAME or FILE",
                do="write a JSON file with template and answers",
            )  # fmt: skip
    elif prompt in PROMPTS:
        chosen = PROMPTS[prompt]
    elif prompt.endswith(".json") or _exists(prompt):
        chosen = _read(Path(prompt), task)
    else:
        raise DataError.build(
            "--prompt", "unknown template", found=repr(prompt),
            expected="one of " + ", ".join(PROMPTS) + ", or a JSON file",
            do=close_match(prompt, PROMPTS),
        )  # fmt: skip
    _check(chosen, task)
    return _of_task(chosen, task) if prompt in PROMPTS else chosen


def classes_of(prompt: str | None) -> tuple[str, ...] | None:
    """The classes that a prompt file answers, in its order; none for a regression's numbers.

    None where no file is named, for a template by name belongs to a task.

    Raises:
        DataError: a file that cannot be read.
    """
    if prompt is None or prompt in PROMPTS or not (prompt.endswith(".json") or _exists(prompt)):
        return None
    answers = load_json(Path(prompt), "prompt").get("answers")
    if isinstance(answers, list):
        return ()
    return tuple(answers) if isinstance(answers, dict) and len(answers) > 1 else None


def _of_task(prompt: Prompt, task: Task) -> Prompt:
    """Another task's prompt, its answers in the order of this task's classes.

    Classes are told apart by their words; numbers are taken as the other task's.

    Raises:
        DataError: the other task has other classes, so an answer could mean the opposite.
    """
    labels = TASKS[prompt.name].labels
    own = [word.lower() for word in task.labels]
    if own == list(labels) or all(map(str.isdecimal, own)):
        return prompt
    if set(own) != set(labels):
        raise DataError.build(
            f"--prompt {prompt.name}", f"its answers are for other classes than {task.name}'s",
            found=", ".join(labels), expected=", ".join(task.labels),
            do="write a JSON file with template and answers",
        )  # fmt: skip
    answers = dict(zip(labels, prompt.answers, strict=True))
    return replace(prompt, answers=tuple(answers[word] for word in own))


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    tokens_of: Callable[[str], Sequence[int]] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Token numbers of each answer as a target, without special tokens around it.

    Args:
        tokens_of: the tokens of a word; None: as an encoder-decoder's tokenizer writes a target.

    Raises:
        DataError: an answer that the tokenizer cannot write, or two that it writes alike.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    out = []
    for word in prompt.answers:
        found = tokens_of(word) if tokens_of else tokenizer(text_target=word).input_ids
        ids = tuple(i for i in found if i not in special)
        if not ids or tokenizer.unk_token_id in ids:
            raise DataError.build(
                f"prompt {prompt.name}", f"the tokenizer cannot write the answer {word!r}",
                found=tokenizer.convert_ids_to_tokens(list(ids)), expected="known tokens",
                do="choose another answer in a prompt of your own (--prompt FILE)",
            )  # fmt: skip
        if ids in out:
            raise DataError.build(
                f"prompt {prompt.name}", "two answers have the same tokens", found=repr(word),
                expected="different answers",
            )  # fmt: skip
        out.append(ids)
    return tuple(out)


def _columns(task: Task) -> list[str]:
    return [column for column in task.text_columns if column is not None]


def _check(prompt: Prompt, task: Task) -> None:
    """The template's placeholders and the number of answers fit the task."""
    pair = [SECOND] if task.text_columns[1] is not None else []
    known = {*_columns(task), FIRST, *pair}
    used = PLACEHOLDER.findall(prompt.template)
    unknown = [name for name in used if name not in known]
    if unknown or not used:
        raise DataError.build(
            f"prompt {prompt.name}", f"does not fit task {task.name}",
            found=f"placeholder {{{unknown[0]}}}" if unknown else "no placeholder",
            expected=" or ".join(f"{{{name}}}" for name in sorted(known)),
        )  # fmt: skip
    count = len(prompt.answers)
    numbers = count > 1 and _rising(prompt.answers)
    if not (numbers if task.regression else count == len(task.labels)):
        raise DataError.build(
            f"prompt {prompt.name}", f"its answers are not those of task {task.name}",
            found=" ".join(prompt.answers), expected=task.accepted(),
        )  # fmt: skip


def _rising(answers: Sequence[str]) -> bool:
    try:
        numbers = [float(word) for word in answers]
    except ValueError:
        return False
    return all(map(math.isfinite, numbers)) and all(a < b for a, b in pairwise(numbers))


def _read(path: Path, task: Task) -> Prompt:
    """A prompt file. Answers are given by class name; for a regression task as a list."""
    raw = load_json(path, "prompt")
    template, answers = raw.get("template"), raw.get("answers")
    if not isinstance(template, str) or not isinstance(answers, list if task.regression else dict):
        form = '["0.0", ...]' if task.regression else '{"<label>": "<word>", ...}'
        raise DataError.build(
            path, "not a prompt", found=", ".join(raw) or "no keys",
            expected=f'{{"template": "...", "answers": {form}}}',
        )  # fmt: skip
    words = list(map(str, answers)) if task.regression else _in_order(path, task, answers)
    return Prompt(path.stem, template, tuple(words))


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # a whole template as a name is too long for one
        return False


def load_json(path: Path, what: str) -> Mapping[str, Any]:
    """The object of a small JSON file that the flag --``what`` names.

    Raises:
        DataError: it cannot be read, is large, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        raw = json.loads(content) if len(content) <= LARGEST_FILE else None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError.build(f"--{what} {path}", f"cannot be read ({error})") from None
    if raw is None and len(content) > LARGEST_FILE:
        raise DataError.build(
            path, f"too large for a {what}", expected=f"at most {LARGEST_FILE} bytes"
        )
    if not isinstance(raw, dict):
        raise DataError.build(path, f"not a {what}", found=type(raw).__name__, expected="an object")
    return raw


def _in_order(path: Path, task: Task, answers: Mapping[str, Any]) -> list[str]:
    """The words in the order of the task's labels, each label exactly once."""
    for label in answers:
        if label not in task.labels:
            raise DataError.build(
                path, f"an answer for a label that task {task.name} does not have",
                found=repr(label), expected=", ".join(task.labels),
            )  # fmt: skip
    words = []
    for label in task.labels:
        word = answers.get(label)
        if not isinstance(word, str) or not word.strip():
            raise DataError.build(
                path, f"no answer for label {label!r}", found=repr(word), expected="a word"
            )
        if word in words:
            raise DataError.build(path, "two labels with one answer", found=repr(word))
        words.append(word)
    return words
