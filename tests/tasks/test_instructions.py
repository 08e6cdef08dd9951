"""Instructions from files of every form, and the templates that write them down."""

from __future__ import annotations

import json

import pytest
from support.jsonl import write_jsonl

from pem_composition.errors import DataError
from pem_composition.tasks.data import RowFiles
from pem_composition.tasks.instruction_rows import (
    CHAT,
    SECTIONS,
    answered,
    examples_of,
    fingerprints,
    get_template,
    load_instructions,
)
from pem_composition.tasks.tables import read_table

LONG = "a text of more than twenty letters"


class Tokenizer:
    """As far as a template needs one: its chat template joins role and text."""

    chat_template = "set"

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{t['role']}>{t['content']}" for t in turns) + "<assistant>"


def seen(examples):
    return [(e.text, e.text_pair, e.label) for e in examples]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, [("a", "b", "c")]),
        ({"instruction": "a", "input": " ", "output": "c"}, [("a", None, "c")]),
        ({"instruction": "a", "output": "c", "toxicity": 0.9}, [("a", None, "c")]),
        ({"prompt": "a", "type": "homonyms"}, [("a", None, None)]),
        ({"instruction": "a", "input": None, "output": None}, [("a", None, None)]),
        (
            {"instruction": "a", "instances": [{"input": "b", "output": "c"}, {"output": "d"}]},
            [("a", "b", "c"), ("a", None, "d")],
        ),
    ],
)
def test_rows_of_every_form_are_read(tmp_path, row, expected):
    examples = examples_of(read_table(write_jsonl(tmp_path / "f.jsonl", [row])))
    assert seen(examples) == expected
    assert examples[0].row == row


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"text": "a"},
            "no instructions; found text, expected a column named instruction or prompt",
        ),
        ({"instruction": " "}, "line 1: column 'instruction' is empty"),
        ({"instruction": 3}, "line 1: column 'instruction' is not text; found int"),
        ({"instruction": "a", "output": ["b"]}, "column 'output' is not text; found list"),
        ({"instruction": "a", "instances": []}, "'instances' is no list of objects; found list"),
        ({"instruction": "a", "instances": ["b"]}, "'instances' is no list of objects"),
    ],
)
def test_rows_without_an_instruction_are_refused(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        examples_of(read_table(write_jsonl(tmp_path / "f.jsonl", [row])))


def test_training_rows_need_answers_and_empty_ones_are_counted(tmp_path):
    rows = [{"instruction": f"i{i}", "output": "" if i == 2 else f"o{i}"} for i in range(5)]
    file = write_jsonl(tmp_path / "f.jsonl", rows)
    data = load_instructions(
        None, RowFiles(train_file=file, validation_file=file, max_train_samples=3)
    )
    assert [e.label for e in data.train] == ["o0", "o1", "o3"]
    assert [e.label for e in data.validation] == ["o0", "o1", "o3", "o4"]
    assert data.notes[0].endswith("f.jsonl: 1 rows without an answer left out")
    for rows, words in (
        ([{"instruction": "a"}], r"no answers; found instruction, expected columns instruction"),
        ([{"instruction": "a", "output": " "}], "every answer is empty"),
    ):
        with pytest.raises(DataError, match=words):
            answered(read_table(write_jsonl(tmp_path / "g.jsonl", rows)), [])
    with pytest.raises(DataError, match="no set of instructions; found rte"):
        load_instructions("rte", RowFiles(train_file=file))


def test_a_template_writes_with_and_without_an_input_and_takes_texts_as_they_are():
    text = SECTIONS.text("Say {input} {x}.", None, Tokenizer())
    assert text.endswith("### Instruction:\nSay {input} {x}.\n\n### Response:\n")
    assert "### Input" not in text
    text = SECTIONS.text("Add.", "1 {instruction} 2", Tokenizer())
    assert text.endswith(
        "### Instruction:\nAdd.\n\n### Input:\n1 {instruction} 2\n\n### Response:\n"
    )
    assert CHAT.text("Add.", "1 2", Tokenizer()) == "<user>Add.\n\n1 2<assistant>"
    assert CHAT.text("Add.", None, Tokenizer()) == "<user>Add.<assistant>"


def test_a_chat_template_must_be_there():
    plain = Tokenizer()
    plain.chat_template = None
    with pytest.raises(DataError, match="no chat template; use --template sections"):
        CHAT.text("Add.", None, plain)


def test_an_answer_is_cut_where_the_next_section_begins():
    assert SECTIONS.cut(" yes \n\n### Instruction:\nmore") == "yes"
    assert SECTIONS.cut("yes") == CHAT.cut(" yes ") == "yes"
    assert SECTIONS.cut("### Response: no") == ""


def test_templates_are_named_or_files(tmp_path):
    assert get_template() is get_template("sections") is SECTIONS
    assert get_template("chat") is CHAT
    file = tmp_path / "mine.json"
    content = {"with_input": "{instruction}|{input}=", "without_input": "{instruction}="}
    file.write_text(json.dumps(content))
    mine = get_template(str(file))
    assert mine.text("a", "b", Tokenizer()) == "a|b=" and mine.text("a", None, Tokenizer()) == "a="
    assert mine.cut("x ### y") == "x ### y", "nothing to stop at was named"
    assert mine.content() != SECTIONS.content()
    with pytest.raises(DataError, match="--template: unknown; found 'alpaka'"):
        get_template("alpaka")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"without_input": "Do it."}, "'without_input' lacks {instruction}; add it"),
        ({"with_input": "{instruction}"}, "'with_input' lacks {input}; add it"),
        ({"with_input": None}, "no text 'with_input'"),
        ({"stop": "###"}, "'stop' is no list of texts"),
        ({"stop": [""]}, "'stop' is no list of texts"),
    ],
)
def test_files_that_are_no_template_are_refused(tmp_path, changes, words):
    file = tmp_path / "t.json"
    good = {"with_input": "{instruction} {input}", "without_input": "{instruction}", "stop": ["#"]}
    file.write_text(json.dumps(good | changes))
    with pytest.raises(DataError, match=words):
        get_template(str(file))
    file.write_text("[]")
    with pytest.raises(DataError, match="not a template; found list"):
        get_template(str(file))


def test_texts_are_compared_up_to_case_and_punctuation_if_they_are_long_enough(tmp_path):
    rows = [
        {"instruction": LONG.upper() + "!", "input": "", "output": "yes"},
        {"instruction": "short", "input": LONG, "output": LONG + " too"},
    ]
    first, second = fingerprints(read_table(write_jsonl(tmp_path / "f.jsonl", rows)))
    assert first == {"atextofmorethantwentyletters"}
    assert second == {"shortatextofmorethantwentyletters", "atextofmorethantwentyletterstoo"}
    comments = read_table(write_jsonl(tmp_path / "c.jsonl", [{"text": LONG}, {"text": "short"}]))
    assert fingerprints(comments) == [first, frozenset()]
    assert fingerprints(comments, 1) == [first, {"short"}]
    many = [{"instruction": LONG, "instances": [{"output": LONG + "1"}, {"output": LONG + "2"}]}]
    (row,) = fingerprints(read_table(write_jsonl(tmp_path / "m.jsonl", many)))
    assert len(row) == 3
