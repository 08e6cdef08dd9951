"""``pem generate`` and ``pem perplexity``: what they write, and what they refuse in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
from support.jsonl import read_jsonl, write_jsonl
from support.texts import generate
from support.tiny_models import random_module, tiny, write_causal

from pem_composition import checkpoint
from pem_composition.checkpoint import base_identity
from pem_composition.errors import Preempted
from pem_composition.evaluation.causal import CausalModel
from pem_composition.evaluation.decoding import Sampling
from pem_composition.evaluation.models import load_causal

WORDS = ["good", "fine", "great", "nice", "bad", "poor", "awful", "sad"]
LENGTH = ("--max_new_tokens", 9)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A tiny Llama, a module for it and for another one, prompts and a text."""
    folder = tmp_path_factory.mktemp("causal")
    for seed in (0, 1):
        base = write_causal(folder / f"base{seed}", "llama", [" ".join(WORDS)], seed=seed)
        module = random_module(tiny("llama", seed=seed))
        checkpoint.save(replace(module, base=base_identity(base)), folder / f"module{seed}")
    prompts = [{"prompt": {"text": "good fine"}}, {"prompt": {"text": "bad"}}]
    write_jsonl(folder / "prompts.jsonl", prompts)
    (folder / "text.raw").write_text("\n".join([" ".join(WORDS[i % 5 :]) for i in range(20)]))
    return folder


def test_the_file_holds_what_the_library_gives_with_and_without_a_module(pem, bench, tmp_path):
    model = ("generate", "--model_name_or_path", bench / "base0")
    asked = ("--prompt_file", bench / "prompts.jsonl", "--num_samples", 3, "--seed", 5, *LENGTH)
    done = pem(*model, *asked, "--output_file", tmp_path / "a" / "out.jsonl", "--top_k", 20)
    assert done.code == 0 and "6 texts" in done.out, done.err
    base, tokenizer, _ = load_causal(bench / "base0")
    expected = generate(
        base, tokenizer, ["good fine", "bad"], Sampling(max_new_tokens=9, top_k=20),
        samples=3, seed=5,
    )  # fmt: skip
    found = read_jsonl(tmp_path / "a" / "out.jsonl")
    assert found == [sample._asdict() for sample in expected]
    assert {"prompt", "text", "sample", "seed"} <= found[0].keys()
    changed = tmp_path / "changed.jsonl"
    adapter = ("--adapter", bench / "module0", "--batch_size", 2)
    assert pem(*model, *asked, *adapter, "--output_file", changed, "--top_k", 20).code == 0
    assert [r["text"] for r in read_jsonl(changed)] != [r["text"] for r in found]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out.jsonl"]


def test_a_file_may_have_as_long_a_name_as_the_system_allows(pem, bench, tmp_path):
    file = tmp_path / ("a" * 255)
    done = pem("generate", "--model_name_or_path", bench / "base0", "--prompt", "good",
               "--output_file", file, *LENGTH)  # fmt: skip
    assert done.code == 0 and len(read_jsonl(file)) == 1, done.err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["generate", "answer"])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(pem, bench, tmp_path, monkeypatch, program):
    """Stopped before its third batch; other settings, modules and rows never meet what it wrote."""
    from pem_composition.evaluation import beams
    from pem_composition.evaluation import text_sampling as library

    rows = [{"instruction": f"{a} {b}"} for a in WORDS for b in WORDS[:2]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "t.json").write_text('{"with_input": "{instruction} {input}", '
                                     '"without_input": "{instruction} "}')  # fmt: skip
    module, name = (library, "_write") if program == "generate" else (beams, "_search")
    own = {
        "generate": ("--prompt_file", bench / "prompts.jsonl", "--num_samples", 8, *LENGTH),
        "answer": ("--instruction_file", tmp_path / "rows.jsonl", "--template",
                   tmp_path / "t.json", "--num_beams", 2, "--max_new_tokens", 6),
    }[program]  # fmt: skip
    argv = (program, "--model_name_or_path", bench / "base0", "--batch_size", 4, *own)
    assert pem(*argv, "--output_file", tmp_path / "whole.jsonl").code == 0
    out, calls, plain = tmp_path / "out.jsonl", [], getattr(module, name)

    def counted(*given, stop=None, **more):
        calls.append(1)
        if len(calls) == stop:
            raise Preempted("SIGTERM: stopped")
        return plain(*given, **more)

    def again(*more, stop=None):
        calls.clear()
        monkeypatch.setattr(module, name, partial(counted, stop=stop))
        done = pem(*argv, *more, "--output_file", out, "--overwrite")
        return done, len(calls)

    done, _ = again(stop=3)
    hidden = tmp_path / ".out.jsonl.partial"
    assert done.code == 75 and not out.exists() and hidden.is_file()
    hidden.write_bytes(hidden.read_bytes() + b'{"key": "torn')  # a kill in the middle of a line
    kept = hidden.read_bytes()
    done, count = again()
    assert done.code == 0 and count == 2 and "8 " in done.out and "written before" in done.out
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not hidden.exists()
    longer = "--max_new_tokens", 5
    for more in (("--adapter", bench / "module0"), longer, ("--batch_size", 3), ("--bf16",)):
        hidden.write_bytes(kept)
        done, count = again(*more)
        assert done.code == 0 and count >= 4 and "before" not in done.out, more
        assert not hidden.exists()
        expected = tmp_path / "expected.jsonl"
        pem(*argv, *more, "--output_file", expected, "--overwrite")
        assert out.read_bytes() == expected.read_bytes()


def test_a_changed_model_never_meets_the_texts_of_another(pem, bench, tmp_path, monkeypatch):
    shutil.copytree(bench / "base0", tmp_path / "base")
    model = CausalModel(base=str(tmp_path / "base"), use_cpu=True)
    seen = [model.identity()]
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        file = tmp_path / "base" / name
        file.write_text(file.read_text() + " ")
        assert model.identity() not in seen
        seen.append(model.identity())


def test_an_existing_file_is_kept_unless_it_may_be_replaced(pem, bench, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    argv = ("generate", "--model_name_or_path", bench / "base0", "--prompt", "bad", *LENGTH)
    done = pem(*argv, "--output_file", out)
    assert done.code == 2 and "the output exists" in done.err and out.read_text() == "mine"
    assert pem(*argv, "--output_file", out, "--overwrite").code == 0
    assert len(read_jsonl(out)) == 1
    failed = pem(*argv[:-1], 99, "--output_file", out, "--overwrite")
    assert failed.code == 2 and len(read_jsonl(out)) == 1, "a failed run leaves the file as it was"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, "--prompt or --prompt_file"),
        ({"prompt_file": "prompts.jsonl"}, "--prompt or --prompt_file"),
        ({"prompt": None, "prompt_file": "empty.jsonl"}, "the file is empty"),
        ({"max_new_tokens": None}, "--max_new_tokens N, or --max_length N"),
        ({"max_new_tokens": 65}, "would not fit in the model's context; found 2 tokens and 65"),
        ({"num_samples": 0}, "--num_samples"),
        ({"adapter": "module1"}, "belongs to another base model"),
        ({"adapter": "nothing"}, "nothing"),
        ({"model_name_or_path": "nothing"}, "no such directory"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(pem, bench, tmp_path, changes, words):
    (bench / "empty.jsonl").write_text("")
    flags = {
        "model_name_or_path": "base0",
        "prompt": "bad",
        "max_new_tokens": 5,
        "output_file": tmp_path / "new" / "out.jsonl",
    } | changes
    paths = ("model_name_or_path", "prompt_file", "adapter")
    argv = [
        word
        for name, value in flags.items()
        if value is not None
        for word in (f"--{name}", bench / str(value) if name in paths else value)
    ]
    done = pem("generate", *argv)
    assert done.code == 2 and words in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.jsonl*"))


def test_perplexity_is_printed_and_written_with_and_without_a_module(pem, bench, tmp_path):
    argv = ("perplexity", "--model_name_or_path", bench / "base0", "--text_file")
    done = pem(*argv, bench / "text.raw", "--output_dir", tmp_path / "base")
    assert done.code == 0, done.err
    assert "the model takes 66 tokens" in done.out and "perplexity_stderr" in done.out
    found = json.loads((tmp_path / "base" / "perplexity_results.json").read_text())
    assert (found["window"], found["stride"]) == (66, 33)
    assert f"{found['perplexity']:.4f}" in done.out
    other = ("--adapter", bench / "module0", "--output_dir", tmp_path / "module")
    assert pem(*argv, bench / "text.raw", *other).code == 0
    changed = json.loads((tmp_path / "module" / "perplexity_results.json").read_text())
    assert changed["tokens"] == found["tokens"] and changed["perplexity"] != found["perplexity"]
    refused = pem(*argv, bench / "none.raw")
    assert refused.code == 2 and "no such file" in refused.err
    stride = pem(*argv, bench / "text.raw", "--window", 16, "--stride", 16)
    assert stride.code == 2 and "--stride" in stride.err
