"""``pem pairs`` and ``pem helpfulness``: what they ask, what they read, what they refuse."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from support.jsonl import read_jsonl, write_jsonl

from pem_composition import cli
from pem_composition.endpoint import answer_grades, comment_pairs
from pem_composition.tasks.instruction_rows import examples_of
from pem_composition.tasks.tables import read_table

pytest.importorskip("openai")
KEY = "sk-secret-of-the-test"


@pytest.fixture
def pem(capsys, server):
    """pem("pairs", flags...) -> exit code, output, error; the endpoint's flags are added."""

    def run(name, *flags):
        place = ("--model", "m", "--base_url", server.url, "--max_retries", 0, "--parallel", 1)
        code = cli.main([str(word) for word in (name, *flags, *place)])
        captured = capsys.readouterr()
        assert captured.err.count("\n") == bool(code)
        return code, captured.out, captured.err

    return run


@pytest.fixture
def comments(tmp_path):
    return write_jsonl(tmp_path / "comments.jsonl", [{"text": f" comment {i} "} for i in range(4)])


def test_each_comment_gets_an_instruction_and_the_pairs_can_be_trained_on(
    pem, server, comments, tmp_path
):
    server.answer = lambda messages: f'Instruction: "Write {messages[-1]["content"]}."'
    out = tmp_path / "pairs.jsonl"
    code, told, _ = pem("pairs", "--comments", comments, "--output_file", out, "--max_requests", 3)
    assert code == 0 and "3 replies" in told and "stopped by --max_requests with 1 to go" in told
    code, told, _ = pem("pairs", "--comments", comments, "--output_file", out)
    assert code == 0 and "1 replies" in told and "3 known before" in told
    assert server.asked == [f"comment {i}" for i in range(4)]
    examples = examples_of(read_table(out))
    assert [(e.text, e.text_pair, e.label) for e in examples] == [
        (f"Write comment {i}.", None, f"comment {i}") for i in range(4)
    ]
    assert KEY not in out.read_text()


def test_examples_are_shown_as_earlier_turns_drawn_for_each_comment(
    pem, server, comments, tmp_path
):
    server.answer = lambda messages: "Do it."
    shots = [{"instruction": f"i{i}", "output": f"o{i}"} for i in range(9)]
    flags = (
        "--shots",
        write_jsonl(tmp_path / "s.jsonl", shots),
        "--num_shots",
        3,
        "--comments",
        comments,
    )
    assert pem("pairs", *flags, "--output_file", tmp_path / "a.jsonl")[0] == 0
    drawn = []
    for request in server.requests:
        system, *turns, comment = request["messages"]
        assert system == {"role": "system", "content": comment_pairs.TASK}
        assert comment["role"] == "user" and comment["content"].startswith("comment")
        said = [(turns[i]["content"], turns[i + 1]["content"]) for i in range(0, 6, 2)]
        assert all(o[1:] == i[1:] and (o[0], i[0]) == ("o", "i") for o, i in said)
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
        drawn.append(tuple(said))
    assert len(set(drawn)) > 1
    assert pem("pairs", *flags, "--output_file", tmp_path / "b.jsonl", "--seed", 1)[0] == 0
    assert server.requests[4]["messages"] != server.requests[0]["messages"]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Say it.", "Say it."),
        (' "Say it." ', "Say it."),
        ("The instruction: Say it.", "Say it."),
        ("Say it.\nThen more.", None),
        ("Look at http://x.", None),
        ("I'm sorry, but I cannot help with that.", None),
        ("", None),
        ("x" * 500, None),
    ],
)
def test_the_instruction_is_read_out_of_the_reply(reply, expected):
    assert comment_pairs.instruction_of(reply) == expected


def answers(path, words):
    rows = [
        {"row": i, "instruction": f"i{i}", "input": None, "answer": w} for i, w in enumerate(words)
    ]
    return write_jsonl(path, rows)


def test_answers_are_graded_one_by_one(pem, server, tmp_path):
    file = answers(tmp_path / "a.jsonl", ["bad", "good", "best"])
    grades = {"bad": "2", "good": "Grade: 7.5/10", "best": "10"}

    def grade(messages):
        assert messages[0]["content"] == answer_grades.RUBRIC
        return grades[re.search(r"Answer:\n(\w+)\n", messages[1]["content"])[1]]

    server.answer = grade
    out = tmp_path / "g.jsonl"
    code, told, _ = pem("helpfulness", "--answers", file, "--output_file", out, "--json")
    found = json.loads(told)
    assert code == 0 and found["n"] == 3 and found["grade"] == pytest.approx(6.5)
    error = statistics.stdev([2, 7.5, 10]) / 3**0.5
    assert found["grade_stderr"] == pytest.approx(error)
    assert [line["grades"] for line in read_jsonl(out)] == [[2.0], [7.5], [10.0]]
    code, told, _ = pem("helpfulness", "--answers", file, "--output_file", out)
    assert "3 known before" in told and f"grade  6.500 +- {error:.3f}" in told
    assert len(server.requests) == 3


def test_two_answers_are_graded_side_by_side_in_both_orders(pem, server, tmp_path):
    """A grader that favours the first place by two points: the orders take that out."""
    worth = {"bad": 2.0, "fair": 5.0, "good": 6.0}

    def grade(messages):
        first, second = re.findall(r"Answer [AB]:\n(\w+)\n", messages[1]["content"])
        return f"A: {worth[first] + 2:g}, B: {worth[second]:g}"

    server.answer = grade
    own = answers(tmp_path / "a.jsonl", ["good", "fair", "bad", "good"])
    other = answers(tmp_path / "b.jsonl", ["fair", "fair", "good", "bad"])
    out = tmp_path / "g.jsonl"
    flags = ("--answers", own, "--against", other, "--output_file", out, "--json")
    code, told, _ = pem("helpfulness", *flags)
    found = json.loads(told)
    assert code == 0 and len(server.requests) == 8
    assert (found["wins"], found["ties"], found["losses"]) == (0.5, 0.25, 0.25)
    assert 0 < found["wins_low"] < 0.5 < found["wins_high"] < 1
    differences = [1, 0, -4, 4]
    assert found["difference"] == pytest.approx(statistics.mean(differences))
    assert found["difference_stderr"] == pytest.approx(statistics.stdev(differences) / 2)
    assert found["grade"] == pytest.approx(statistics.mean([6, 5, 2, 6]) + 1)
    assert found["consistent"] == 0.5, "by two points the first of near equals wins in both places"
    refused = pem("helpfulness", "--answers", own, "--against", answers(tmp_path / "c", ["x"]),
                  "--output_file", out)  # fmt: skip
    assert refused[0] == 2


def test_a_result_over_a_part_says_so(pem, server, tmp_path):
    """Refusals, filters, cut replies and those without a grade are counted; none is a grade."""
    words = ["good", "filtered", "refused", "null", "cut", "odd", "thought"]
    file, out = answers(tmp_path / "a.jsonl", words), tmp_path / "g.jsonl"

    def reply(content, end="stop", **more):
        message = {"role": "assistant", "content": content, **more}
        choice = {"index": 0, "message": message, "finish_reason": end}
        return 200, {}, {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                         "choices": [choice]}  # fmt: skip

    blocked = {"error": {"message": "no", "code": "content_filter", "type": "bad_request"}}
    given = {
        "good": reply("8"),
        "filtered": (400, {}, blocked),
        "refused": reply(None, refusal="I cannot do that."),
        "null": reply(None),
        "cut": reply("There are 3", "length"),
        "odd": reply("There are 3 things to check"),
        "thought": reply("<think>There are 3 things, so 4.</think>\n\n6"),
    }
    plain = server.take

    def scripted(request, key):
        plain(request, key)
        return given[re.search(r"Answer:\n(\w+)\n", request["messages"][1]["content"])[1]]

    server.take = scripted
    flags = ("--answers", file, "--output_file", out)
    found = json.loads(pem("helpfulness", *flags, "--json")[1])
    assert (found["n"], found["of"], found["grade"]) == (2, 7, 7.0)
    counts = ("refused", "cut", "unreadable", "left", "stopped")
    assert [found[name] for name in counts] == [3, 1, 1, 0, ""]
    refusals = read_jsonl(tmp_path / "g.refused.jsonl")
    assert [(line["row"], bool(line["refused"])) for line in refusals] == [
        (1, True), (2, True), (3, True),
    ]  # fmt: skip
    asked = len(server.requests)
    told = pem("helpfulness", *flags)[1]
    assert len(server.requests) == asked + 4, "what was refused is not asked again"
    assert "a part: 2 of 7 rows have grades" in told and "3 refused, 1 replies cut" in told


def test_mistakes_are_one_line(pem, server, comments, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    given = ("--comments", comments, "--output_file", out)
    for flags, words in (
        ((*given, "--max_requests", 0), "--max_requests: cannot be used; found 0"),
        ((*given, "--timeout", 0), "--timeout: cannot be used"),
        ((*given, "--shots", comments), "no instructions; found text"),
        (
            ("--comments", write_jsonl(tmp_path / "e.jsonl", []), "--output_file", out),
            "the file is empty",
        ),
    ):
        code, _, error = pem("pairs", *flags)
        assert code == 2 and words in error
    wrong = write_jsonl(tmp_path / "w.jsonl", [{"instruction": "a"}])
    code, _, error = pem("helpfulness", "--answers", wrong, "--output_file", out)
    assert code == 2 and "line 1: no answer to grade; found instruction" in error
    server.script = [(500, {}, {"error": {"message": "down"}})]
    code, _, error = pem("pairs", *given)
    assert code == 3 and "nothing was written yet; the same command goes on" in error
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, error = pem("pairs", *given)
    assert code == 2 and "OPENAI_API_KEY: no key in the environment" in error
    assert not out.exists()


def test_replies_are_never_appended_to_another_file(pem, server, tmp_path):
    file = answers(tmp_path / "a.jsonl", ["good"])
    table, more = tmp_path / "t.csv", answers(tmp_path / "b.jsonl", ["good"])
    table.write_text("a,b\n1,2\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    for other in (more, table, folder):
        before = other.read_bytes() if other.is_file() else None
        code, _, error = pem("helpfulness", "--answers", file, "--output_file", other)
        assert code == 2 and "holds something else than replies" in error
        assert before is None or other.read_bytes() == before
    assert not server.requests
