"""Prompts ask with a row's texts as they are; what cannot be asked or answered is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pem_composition.errors import DataError
from pem_composition.tasks.data import Example
from pem_composition.tasks.glue import TASKS, Task
from pem_composition.tasks.prompts import LARGEST_FILE, PROMPTS, answer_tokens, get_prompt

SENTIMENTS = {"negative": "bad", "positive": "good"}


def written(folder, **content):
    path = folder / "mine.json"
    path.write_text(json.dumps(content))
    return str(path)


def refused(task, prompt):
    with pytest.raises(DataError) as error:
        get_prompt(TASKS[task], prompt)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    return str(error.value)


def filled(prompt, task, first, second):
    """The template filled by plain replacement of the task's own columns."""
    text = prompt.template
    for column, value in zip(task.text_columns, (first, second), strict=True):
        text = text.replace("{" + column + "}", value) if column else text
    return text


@pytest.mark.parametrize("name", [name for name in TASKS if name in PROMPTS])
def test_every_template_takes_both_texts_and_has_an_answer_for_every_class(name):
    task, prompt = TASKS[name], get_prompt(TASKS[name])
    pair = task.text_columns[1] is not None
    source = prompt.source(task, Example("FIRST", "SECOND" if pair else None, 0, 0))
    assert source == filled(prompt, task, "FIRST", "SECOND")
    assert source.count("FIRST") == 1 and source.count("SECOND") == int(pair)
    assert "{" not in source
    labels = range(task.num_labels) if not task.regression else [i / 5 for i in range(26)]
    targets = [prompt.target(task, Example("a", None, label, 0)) for label in labels]
    assert tuple(targets) == prompt.answers


def test_the_paper_s_words_and_the_class_order():
    rte, mnli, sst2 = (get_prompt(TASKS[name]) for name in ("rte", "mnli", "sst2"))
    row = Example("It rains.", "It is wet.", 0, 0)
    assert rte.source(TASKS["rte"], row) == (
        'Does "It rains." imply that "It is wet."? Please answer either yes or no.'
    )
    assert mnli.source(TASKS["mnli"], row) == (
        'Does "It rains." imply that "It is wet."? Please answer yes, no or maybe.'
    )
    assert dict(zip(TASKS["rte"].labels, rte.answers, strict=True)) == {
        "entailment": "Yes", "not_entailment": "No",
    }  # fmt: skip
    assert dict(zip(TASKS["mnli"].labels, mnli.answers, strict=True)) == {
        "entailment": "Yes", "neutral": "Maybe", "contradiction": "No",
    }  # fmt: skip
    assert sst2.source(TASKS["sst2"], Example("fine film", None, 1, 0)) == (
        "Is the following review positive or negative? fine film"
    )


@pytest.mark.parametrize("name", ["imdb", "yelp_polarity", "amazon_polarity", "rotten_tomatoes"])
def test_reviews_are_read_as_they_are(name):
    task = TASKS[name]
    prompt = get_prompt(task)
    assert prompt.source(task, Example("Just so.", None, 1, 0)) == "Just so."
    assert prompt.target(task, Example("", None, 1, 0)) == "positive"
    local = Task("file", ("review", None), ("negative", "positive"))
    assert get_prompt(local) == prompt


@given(st.text(), st.text())
def test_texts_are_inserted_as_they_are(first, second):
    task = TASKS["rte"]
    source = PROMPTS["rte"].source(task, Example(first, second, 0, 0))
    start, middle, end = 'Does "', '" imply that "', '"? Please answer either yes or no.'
    assert source == start + first + middle + second + end


def test_braces_and_placeholders_in_a_text_stay():
    row = Example("{sentence2} {} {0}", "{text} \\1", 0, 0)
    source = PROMPTS["rte"].source(TASKS["rte"], row)
    assert source.startswith('Does "{sentence2} {} {0}" imply that "{text} \\1"?')


def test_a_number_is_answered_by_the_nearest_one():
    task, prompt = TASKS["stsb"], PROMPTS["stsb"]
    for label in (0.0, 0.05, 1.25, 2.499, 4.96, 5.0):
        nearest = min(prompt.answers, key=lambda word: abs(float(word) - label))
        assert prompt.target(task, Example("a", "b", label, 0)) == nearest


def test_a_row_without_label_has_no_answer():
    with pytest.raises(DataError, match=r"row 7: has no label.*entailment \(0\)"):
        PROMPTS["rte"].target(TASKS["rte"], Example("a", "b", None, 7))


def test_a_file_gives_the_answers_in_any_order_and_general_placeholders(tmp_path):
    answers = {"not_entailment": "nope", "entailment": "right so"}
    path = written(tmp_path, template="{text} => {text_pair} ({sentence1})", answers=answers)
    prompt = get_prompt(TASKS["rte"], path)
    assert prompt.name == "mine" and prompt.answers == ("right so", "nope")
    assert prompt.source(TASKS["rte"], Example("a", "b", 0, 0)) == "a => b (a)"
    numbers = written(tmp_path, template="{text}", answers=["0", "2.5", "5"])
    assert get_prompt(TASKS["stsb"], numbers).answers == ("0", "2.5", "5")
    assert get_prompt(TASKS["mnli"], "snli") == PROMPTS["snli"]


@pytest.mark.parametrize(
    ("task", "content", "words"),
    [
        ("sst2", {"template": "{text}"}, "not a prompt; found template"),
        ("sst2", {"template": 3, "answers": SENTIMENTS}, "not a prompt"),
        ("sst2", {"template": "{text}", "answers": ["bad", "good"]}, '{"<label>": "<word>", ...}'),
        ("stsb", {"template": "{text}", "answers": SENTIMENTS}, '["0.0", ...]'),
        ("sst2", {"template": "no text", "answers": SENTIMENTS}, "found no placeholder"),
        ("sst2", {"template": "{txt}", "answers": SENTIMENTS}, "found placeholder {txt}"),
        ("sst2", {"template": "{text_pair}", "answers": SENTIMENTS}, "placeholder {text_pair}"),
        (
            "sst2",
            {"template": "{text}", "answers": SENTIMENTS | {"neutral": "so so"}},
            "a label that task sst2 does not have; found 'neutral', expected negative, positive",
        ),
        ("sst2", {"template": "{text}", "answers": {"negative": "x"}}, "no answer for label 'pos"),
        (
            "sst2",
            {"template": "{text}", "answers": SENTIMENTS | {"positive": " "}},
            "no answer for label 'positive'; found ' '",
        ),
        (
            "sst2",
            {"template": "{text}", "answers": SENTIMENTS | {"positive": 1}},
            "no answer for label 'positive'; found 1",
        ),
        (
            "sst2",
            {"template": "{text}", "answers": {"negative": "x", "positive": "x"}},
            "two labels with one answer; found 'x'",
        ),
        ("stsb", {"template": "{text}", "answers": ["1"]}, "its answers are not those"),
        ("stsb", {"template": "{text}", "answers": ["2", "1"]}, "its answers are not those"),
        ("stsb", {"template": "{text}", "answers": ["1", "1.0"]}, "its answers are not those"),
        ("stsb", {"template": "{text}", "answers": ["1", "inf"]}, "its answers are not those"),
        ("stsb", {"template": "{text}", "answers": ["low", "high"]}, "its answers are not those"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, task, content, words):
    assert words in refused(task, written(tmp_path, **content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"template": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[]", "not a prompt; found list, expected an object"),
        (b"null", "not a prompt; found NoneType, expected an object"),
        (b" " * (LARGEST_FILE + 1), "too large for a prompt"),
    ],
    ids=["empty", "cut", "binary", "deep", "number", "list", "null", "large"],
)
def test_files_that_are_no_prompt_are_refused(tmp_path, content, words):
    (tmp_path / "mine.json").write_bytes(content)
    assert words in refused("sst2", str(tmp_path / "mine.json"))


def test_names_that_are_no_prompt_are_refused(tmp_path):
    assert "cannot be read" in refused("sst2", str(tmp_path / "absent.json"))
    assert "cannot be read" in refused("sst2", str(tmp_path))
    message = refused("sst2", "sst")
    assert "--prompt: unknown template; found 'sst'" in message
    assert "did you mean sst2?" in message
    assert "expected one of rte, mnli" in refused("sst2", "Is {sentence} good? " * 50)
    assert "does not fit task sst2; found placeholder {sentence1}" in refused("sst2", "rte")


def test_a_prompt_with_other_classes_is_refused():
    message = refused("mnli", "polarity")
    assert "its answers are not those of task mnli; found negative positive" in message
    assert "expected one of entailment (0), neutral (1), contradiction (2)" in message
    three = Task("file", ("text", None), ("a", "b", "c"))
    with pytest.raises(DataError, match="task file: has no prompt of its own"):
        get_prompt(three)


@pytest.mark.parametrize(
    ("task", "name", "answers"),
    [
        ("rte", "wnli", ("Yes", "No")),  # the same classes in another order
        ("wnli", "rte", ("No", "Yes")),
        ("snli", "mnli", ("Yes", "Maybe", "No")),
        ("sst2", "polarity", ("negative", "positive")),
    ],
)
def test_answers_of_another_task_s_prompt_go_by_the_names_of_the_classes(task, name, answers):
    assert get_prompt(TASKS[task], name).answers == answers


def test_case_makes_no_other_class():
    upper = Task("file", ("text", None), ("POSITIVE", "NEGATIVE"))
    assert get_prompt(upper, "polarity").answers == ("positive", "negative")


def test_answers_for_other_classes_are_refused_and_numbers_are_those_of_the_prompt_s_task():
    message = refused("mrpc", "rte")
    assert "--prompt rte: its answers are for other classes than mrpc's" in message
    assert "found entailment, not_entailment, expected not_equivalent, equivalent" in message
    numbers = Task("file", ("text", "text_pair"), ("0", "1"))
    columns = replace(numbers, text_columns=("sentence1", "sentence2"))
    assert get_prompt(columns, "rte").answers == ("Yes", "No")


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "</s>", "<unk>", "yes", "no", "may", "be"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def prompted(tmp_path, *answers):
    labels = tuple("abc"[: len(answers)])
    path = written(tmp_path, template="{text}", answers=dict(zip(labels, answers, strict=True)))
    return get_prompt(Task("file", ("text", None), labels), path)


def test_answers_are_token_numbers_without_special_ones(tokenizer, tmp_path):
    prompt = prompted(tmp_path, "yes", "may be", "no no no")
    assert answer_tokens(tokenizer, prompt) == ((3,), (5, 6), (4, 4, 4))


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (("yes", "nope"), r"cannot write the answer 'nope'; found \['<unk>'\]"),
        (("yes", "no nope"), r"cannot write the answer 'no nope'"),
        (("yes", "</s>"), r"cannot write the answer '</s>'; found \[\]"),
        (("may be", "may  be"), r"two answers have the same tokens; found 'may be'"),
    ],
)
def test_answers_that_cannot_be_told_apart_or_written_are_refused(
    tokenizer, tmp_path, answers, words
):
    with pytest.raises(DataError, match=words):
        answer_tokens(tokenizer, prompted(tmp_path, *answers))
