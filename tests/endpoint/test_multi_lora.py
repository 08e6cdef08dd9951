"""Texts by an engine that serves modules: those of the model here, and of no other weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import unlearning_data as data
from support.jsonl import write_jsonl
from support.judges import write_judge
from support.lora_server import KEY, LoraServer, serving
from support.tiny_models import random_module, tiny

from pem_composition import checkpoint, cli, json_lines
from pem_composition.checkpoint import base_identity
from pem_composition.report.records import read

pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("one_thread")

POINTS = ("base", "module", "strength 0.5", "strength 1")


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> data.Bench:
    return data.make(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def server(bench: data.Bench) -> Iterator[LoraServer]:
    with serving(LoraServer(bench.base)) as found:
        yield found


def words(bench: data.Bench, out: Path, *more: object, module: Path | None = None) -> list[str]:
    """A grid of greedy texts, without who writes them."""
    flags = bench.words(module=module)
    place = flags.index("--top_k")
    flags[place : place + 2] = ["--greedy"]
    flags[flags.index("--num_samples") + 1] = "1"
    return ["negation", *flags, "-p", str(out), "--grid", "0", "0.5", "1", *map(str, more)]


def served(server: LoraServer, *more: object) -> tuple[object, ...]:
    return (
        "--backend", "vllm", "--base_url", server.url, "--served_model_name", server.name,
        "--max_retries", 0, *more,
    )  # fmt: skip


def texts(out: Path) -> dict[str, list[dict]]:
    """The texts of every point, without their scores."""
    found = {}
    for row in read(out).summary["rows"]:
        lines = json_lines.read(out / row["file"])
        found[row["id"]] = [{k: v for k, v in line.items() if k != "scores"} for line in lines]
    return found


@pytest.fixture(scope="module")
def here(bench: data.Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid with texts that are written by the model that is loaded."""
    out = tmp_path_factory.mktemp("here") / "out"
    assert cli.main(words(bench, out)) == 0
    return out


# --- the texts ---


@pytest.fixture(scope="module")
def answered(
    bench: data.Bench, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, LoraServer]:
    """The same grid with texts of the engine, three at once, and what it was asked."""
    out = tmp_path_factory.mktemp("answered") / "out"
    with serving(LoraServer(bench.base)) as server:
        assert cli.main(words(bench, out, *served(server, "--parallel", 3))) == 0
    return out, server


def test_greedy_texts_are_those_of_the_model_here_at_every_point(here, answered):
    out, server = answered
    found = texts(out)
    assert tuple(found) == POINTS and found == texts(here)
    assert len({json.dumps(rows) for rows in found.values()}) == len(POINTS)
    paths = [path for path, _ in server.requests]
    assert paths.count("/v1/load_lora_adapter") == 3 == paths.count("/v1/unload_lora_adapter")
    assert server.loaded == {} and not list(out.glob(".served*"))
    names = [request["model"] for request in server.texts]
    assert [names.count(name) for name in dict.fromkeys(names)] == [3, 3, 3, 3]
    assert names[:3] == ["base"] * 3  # strength 0
    assert 2 <= server.busiest <= 3


def test_the_record_tells_the_engine_and_no_secret(bench, answered, server, tmp_path, capsys):
    out, _ = answered
    records = [r for r in json_lines.read(out / "results.jsonl") if r.get("part") == "texts"]
    assert [(r["backend"], r["served"]) for r in records] == [("vllm", "base")] * 4
    assert read(out).summary["asked"]["backend"] == "vllm"
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert KEY.encode() not in everything
    server.url = server.url.replace("//", "//user:hidden-word@")
    error = refused(2, bench, tmp_path / "other", capsys, *served(server))
    assert "may hold a secret" in error and "hidden-word" not in error


@pytest.mark.slow
def test_engines_do_not_share_texts_and_share_the_rest(bench, here, server, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(here, out)
    before = len(json_lines.read(out / "results.jsonl"))
    assert cli.main(words(bench, out, *served(server))) == 0
    new = [r for r in json_lines.read(out / "results.jsonl")[before:] if "part" in r]
    # Greedy texts are the same, so that what judges said of them counts for both.
    assert [r["part"] for r in new] == ["texts"] * 4
    asked = len(server.requests)
    assert cli.main(words(bench, out, *served(server))) == 0  # nothing to ask
    assert len(server.requests) == asked
    assert ": 0 parts computed" in capsys.readouterr().out


@pytest.mark.slow
def test_settings_reach_the_engine_and_a_seed_belongs_to_one_text(bench, server, tmp_path):
    def asked(folder: str, *more: object) -> list[dict]:
        del server.requests[:]
        flags = bench.words()
        flags[flags.index("--num_samples") + 1] = "2"
        out = ("-p", tmp_path / folder, "--grid", 1, 1, 1)
        line = ["negation", *flags, *map(str, (*out, *served(server, *more)))]
        assert cli.main(line) == 0
        return sorted(server.texts, key=lambda r: (r["model"], r["prompt"], r["seed"]))

    sampling = ("--temperature", 0.7, "--top_p", 0.9)
    first = asked("first", *sampling, "--parallel", 1)
    for request in first:
        assert (request["temperature"], request["top_p"], request["top_k"]) == (0.7, 0.9, 40)
        assert (request["min_p"], request["repetition_penalty"]) == (0, 1)
        assert request["max_tokens"] == 8 and request["stop_token_ids"] == [2]
    base = [r["seed"] for r in first if r["model"] == "base"]
    assert len(set(base)) == 6  # three prompts, two samples of each
    second = asked("second", *sampling, "--parallel", 3, "--batch_size", 4)
    assert [r["seed"] for r in second if r["model"] == "base"] == base
    assert texts(tmp_path / "first") == texts(tmp_path / "second")


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_writes_the_same_bytes(
    bench, here, answered, server, tmp_path, capsys
):
    out = tmp_path / "out"
    line = words(bench, out, *served(server, "--batch_size", 1, "--parallel", 1))
    server.fail_after = 5  # in the middle of the second point
    assert cli.main(line) == 3
    error = capsys.readouterr().err
    assert "stopped by the test" in error and error.count("\n") == 1
    assert len(list(out.glob("texts/[!.]*.jsonl"))) == 1  # whole points alone
    assert server.loaded == {}
    server.fail_after, before = None, len(server.texts)
    assert cli.main(line) == 0
    assert len(server.texts) - before == 12 - 5
    assert texts(out) == texts(here)
    whole = list(answered[0].glob("texts/*.jsonl"))
    assert len(whole) == len(POINTS)
    for path in whole:
        assert (out / "texts" / path.name).read_bytes() == path.read_bytes()


# --- the check ---


def refused(code: int, bench: data.Bench, out: Path, capsys, *more: object, **options) -> str:
    """The error of a grid that gets no texts: one line, and no text is kept."""
    capsys.readouterr()
    assert cli.main(words(bench, out, *more, **options)) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and KEY not in error
    return error


def test_a_module_that_is_not_applied_is_refused(bench, server, tmp_path, capsys):
    server.ignores = True
    error = refused(3, bench, tmp_path / "out", capsys, *served(server))
    assert "answers with the base instead of module" in error and "--backend local" in error
    assert [r["model"] for r in server.texts] == ["base"] * 3
    assert server.loaded == {}


def test_a_module_that_is_applied_too_strongly_is_refused(bench, server, tmp_path, capsys):
    server.scale = 3.0
    error = refused(3, bench, tmp_path / "out", capsys, *served(server))
    assert "answers with other weights instead of module" in error


def test_another_base_is_refused_before_any_text(bench, tmp_path, capsys):
    with serving(LoraServer(bench.base.with_name("strange"))) as other:
        error = refused(2, bench, tmp_path / "out", capsys, *served(other))
    assert "its model base is another base" in error and "--served_model_name" in error
    assert other.texts == [] and "/v1/load_lora_adapter" not in dict(other.requests)


def test_a_module_of_zeros_is_the_base(bench, here, server, tmp_path):
    zero = checkpoint.load(bench.module)
    tensors = {n: t * (not n.endswith(".lora_B")) for n, t in zero.tensors.items()}
    replace(zero, tensors=tensors).save(tmp_path / "zero")
    out = tmp_path / "out"
    assert cli.main(words(bench, out, *served(server), module=tmp_path / "zero")) == 0
    found = texts(out)
    assert all(rows == texts(here)["base"] for rows in found.values())
    assert {request["model"] for request in server.texts} == {"base"}


# --- what a server refuses, and what it lacks ---


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ({"updating": False}, 2, ("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "while it runs")),
        ({"enabled": False}, 2, ("serves no LoRA modules", "--enable-lora")),
        ({"max_rank": 1}, 2, ("no module of rank 4", "--max-lora-rank 8")),
        ({"choices": 0}, 3, ("another number of completions", "found 0")),
        ({"choices": 2}, 3, ("another number of completions", "found 2")),
        ({"logprobs": None}, 3, ("does not tell log-probabilities", "vLLM 0.10.2")),
        ({"logprobs": math.nan}, 3, ("numbers for 0 of", "whose logits are finite")),
        ({"ids": False}, 3, ("not a text with its tokens", "no token_ids")),
    ],
    ids=lambda fault: next(iter(fault)) if isinstance(fault, dict) else None,
)
def test_what_a_server_lacks_is_said_in_one_line(fault, code, said, bench, tmp_path, capsys):
    with serving(replace(LoraServer(bench.base), **fault)) as server:
        error = refused(code, bench, tmp_path / "out", capsys, *served(server))
    assert all(words in error for words in said), error
    assert not list((tmp_path / "out").glob(".served*"))


@pytest.mark.slow
def test_an_error_with_status_200_is_asked_for_again(
    bench, here, server, tmp_path, capsys, monkeypatch
):
    """As routers say that they are busy; other errors end the run with the server's words."""
    right, errors = server._complete, ["overloaded, try again"] * 2
    monkeypatch.setattr(
        server,
        "_complete",
        lambda request: (200, {"error": {"message": errors.pop()}}) if errors else right(request),
    )
    flags = [*served(server)]
    flags[flags.index("--max_retries") + 1] = 2
    assert cli.main(words(bench, tmp_path / "out", *flags)) == 0
    assert texts(tmp_path / "out") == texts(here)
    errors += ["no such thing"]
    error = refused(3, bench, tmp_path / "other", capsys, *flags)
    assert "the request failed" in error and "no such thing" in error


@pytest.mark.parametrize(
    "wrong",
    [
        lambda tokens, ends: [*map(str, tokens)],
        lambda tokens, ends: [*tokens[:-1], 96],  # the vocabulary's size
        lambda tokens, ends: [*tokens[:-1], -1],
        lambda tokens, ends: [*tokens[:-1], True],
        lambda tokens, ends: tokens[:-1],  # and says that the length ended it
        lambda tokens, ends: [*tokens, *tokens],
        lambda tokens, ends: [tokens[0], ends[0], *tokens[2:]],
        lambda tokens, ends: [tokens],
    ],
)
def test_tokens_that_were_not_asked_for_are_no_text(
    wrong, bench, server, tmp_path, capsys, monkeypatch
):
    def greedy(ids, request):
        tokens = right(ids, request)
        return wrong(tokens, request["stop_token_ids"])

    right = server._greedy
    monkeypatch.setattr(server, "_greedy", greedy)
    out = tmp_path / "out"
    error = refused(3, bench, out, capsys, *served(server))
    assert "not a text with its tokens; found finish_reason length, token_ids [" in error
    assert not out.exists()


def test_a_server_of_another_base_leaves_no_trace(bench, tmp_path, capsys):
    for fault in ({"logprobs": None}, {"base": bench.base.with_name("strange")}):
        with serving(replace(LoraServer(bench.base), **fault)) as other:
            assert cli.main(words(bench, tmp_path / "out", *served(other))) in (2, 3)
        assert not (tmp_path / "out").exists()


def test_an_unknown_name_and_no_server_are_said_in_one_line(bench, server, tmp_path, capsys):
    flags = [*served(server)]
    flags[flags.index("base")] = "other"
    error = refused(2, bench, tmp_path / "out", capsys, *flags)
    assert "no such model" in error and "--served_model_name" in error
    flags = ("--backend", "vllm", "--base_url", "http://127.0.0.1:1/v1", "--max_retries", 0)
    error = refused(3, bench, tmp_path / "other", capsys, *flags)
    assert "cannot be reached" in error and "is the server running?" in error


def test_a_folder_that_the_server_does_not_see(bench, server, tmp_path, capsys, monkeypatch):
    load = server._load
    monkeypatch.setattr(server, "_load", lambda name, path: load(name, f"/elsewhere{path}"))
    error = refused(2, bench, tmp_path / "out", capsys, *served(server))
    assert "does not see the module's folder" in error and "--save_path" in error


@pytest.mark.parametrize("kind", ["ia3", "head"])
def test_what_vllm_does_not_serve_is_refused_before_the_model_is_loaded(
    kind, bench, server, tmp_path, capsys, monkeypatch
):
    from pem_composition.evaluation import models

    monkeypatch.setattr(models, "load_causal", None)
    module = random_module(tiny("llama"), "ia3" if kind == "ia3" else "lora", seed=1)
    if kind == "head":
        tensors = {**module.tensors, "norm.weight.head": tiny("llama").model.norm.weight.data}
        module = replace(module, tensors=tensors)
    replace(module, base=base_identity(bench.base)).save(tmp_path / "m")
    error = refused(2, bench, tmp_path / "out", capsys, *served(server), module=tmp_path / "m")
    assert "vLLM" in error and "pem fold" in error and server.requests == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--parallel", 8), "--parallel: has no effect without --backend vllm; add --backend vllm"),
        (("--backend", "vllm"), "--base_url"),
        (("--backend", "vllm", "--base_url", "ftp://here"), "not a URL"),
        (("--backend", "other"), "--backend"),
    ],
)
def test_flags_that_do_not_go_together(flags, said, bench, tmp_path, capsys):
    error = refused(2, bench, tmp_path / "out", capsys, *flags)
    assert said in error


# --- detoxify ---


@pytest.mark.slow
def test_answers_of_detoxified_modules_are_those_of_the_model_here(bench, server, tmp_path, capsys):
    rows = [{"instruction": f"{word} fine", "output": f"{word} sad"} for word in data.GOOD]
    asked = write_jsonl(tmp_path / "asked.jsonl", rows)
    template = {"with_input": "{instruction} {input} ", "without_input": "{instruction} "}
    (tmp_path / "template.json").write_text(json.dumps(template))
    judge = write_judge(tmp_path, " ".join(data.BAD), " ".join(data.GOOD))
    line = [
        "detoxify", "-a", bench.module, bench.other, "--evaluate", "--strength", 0.5,
        "--model_name_or_path", bench.base, "--instruction_file", asked, "--judge", judge,
        "--template", tmp_path / "template.json",
        "--max_new_tokens", 6, "--repetition_penalty", 1.5, "--num_beams", 1,
    ]  # fmt: skip
    outs = tmp_path / "here", tmp_path / "served"
    for out, more in zip(outs, ((), served(server)), strict=True):
        assert cli.main([*map(str, line), "-p", str(out), *map(str, more)]) == 0
    answers = [
        {p.relative_to(out): json_lines.read(p) for p in out.glob("answers/*/*.jsonl")}
        for out in outs
    ]
    assert len(answers[0]) == 6 and answers[0] == answers[1]
    assert {r["repetition_penalty"] for r in server.texts} == {1.5}
    (beams,) = [i for i, word in enumerate(line) if word == "--num_beams"]
    line[beams + 1] = 4
    more = ("-p", tmp_path / "beams", *served(server))
    assert cli.main([*map(str, (*line, *more))]) == 2
    assert "--num_beams" in capsys.readouterr().err
