"""What is copied beside the weights of a whole model: tokenizer and processor whole, code never."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_models import random_module, tiny

import pem_composition as pem
from pem_composition.checkpoint import combine_full, fold_checkpoint
from pem_composition.checkpoint.conversion import convert

# As the hub has them: T5, Llama, GPT-2, BERT, Marian, PhoBERT, Qwen, Mistral, LLaVA, Whisper, LUKE.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "bpe.codes", "qwen.tiktoken",
    "tekken.json", "tokenizer.model.v3", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json",
    "normalizer.json", "entity_vocab.json", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
LEFT = (
    "modeling_own.py", "configuration_own.py", "tokenization_own.py", "setup.py",
    "trainer_state.json",
    "all_results.json", "training_args.bin", "optimizer.pt", "README.md", "LICENSE.txt",
    "requirements.txt", "onnx/model.onnx", "flax_model.msgpack", "tf_model.h5", "events.log",
)  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """base and m1 as they come from a hub, with everything that can lie beside them."""
    root = tmp_path / "in"
    for seed, name in enumerate(("base", "m1"), start=3):
        folder = root / name
        tiny("gpt2", seed=seed).save_pretrained(folder)
        for file in (*COPIED, *LEFT):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(json.dumps({"what": file}))
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnModel",
            "AutoModel": "org/elsewhere--modeling_other.Other",
        }
        (folder / "config.json").write_text(json.dumps(config))
        own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(own))
    random_module(tiny("gpt2")).save(root / "lora")
    return root


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda i, o: combine_full([i / "m1", i / "base"], [0.5, 0.5], o),
    "fold": lambda i, o: fold_checkpoint("a", {"a": i / "lora"}, i / "base", o),
    "convert": lambda i, o: convert(i / "m1", o),
    "save": lambda i, o: pem.load(i / "m1", base=i / "base").save(o),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_tokenizer_and_processor_are_copied_byte_for_byte_and_nothing_else(
    writer: str, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    WRITERS[writer](models, out)
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    own = {"config.json", "model.safetensors", "pem.json", "README.md"}
    assert found == {*COPIED, *own}
    source = models / ("m1" if writer in ("merge", "convert") else "base")
    for file in COPIED:
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert json.loads((out / "pem.json").read_text())["files"].keys() == {*COPIED, *own} - {
        "pem.json", "README.md"
    }  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_code_that_a_configuration_names_is_named_in_the_record(
    writer: str, models: Path, tmp_path: Path
) -> None:
    WRITERS[writer](models, tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "pem.json").read_text())["notes"]
    (note,) = (n for n in notes if "auto_map" in n)
    assert "configuration_own.py, modeling_own.py, tokenization_own.py;" in note
    assert "other" not in note.partition(";")[0].rpartition(":")[2]  # not in this folder


def test_an_overwritten_model_keeps_no_old_processor(models: Path, tmp_path: Path) -> None:
    convert(models / "m1", tmp_path / "out")
    for file in (*COPIED, *LEFT):
        (models / "m1" / file).unlink()
    convert(models / "m1", tmp_path / "out", overwrite=True)
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left == {"config.json", "model.safetensors", "pem.json", "README.md"}


FORMS: dict[str, Callable[[str], str]] = {
    "tokenizer.json": lambda word: json.dumps({"model": {"vocab": {word: 0}}, "added_tokens": []}),
    "spiece.model": str,
    "vocab.txt": str,
    "vocab.json": lambda word: json.dumps({word: 0}),
}


@pytest.mark.parametrize("file", FORMS)
def test_tokenizers_that_differ_are_named_in_the_output_of_a_merge(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pem_composition.cli import main

    for seed, name in enumerate("ab"):
        tiny("gpt2", seed=seed).save_pretrained(tmp_path / name)
        random_module(tiny("gpt2"), seed=seed).save(tmp_path / f"lora-{name}")
        for folder in (name, f"lora-{name}"):
            (tmp_path / folder / file).write_text(FORMS[file](name))
    full = ["--full_merge", "-m", str(tmp_path / "a"), str(tmp_path / "b")]
    own = ["-a", str(tmp_path / "lora-a"), str(tmp_path / "lora-b")]
    for place, modules in (("full", full), ("lora", own)):
        words = [*modules, "-p", str(tmp_path / place), "--coefficients", "0.5", "0.5"]
        assert main(["merge", *words]) == 0
        out = capsys.readouterr().out
        assert "note: tokenizers differ (" in out, out
    again = ["-a", str(tmp_path / "lora-a"), str(tmp_path / "lora-a")]
    words = [*again, "-p", str(tmp_path / "same"), "--coefficients", "0.5", "0.5"]
    assert main(["merge", *words]) == 0
    assert "note:" not in capsys.readouterr().out
