"""Tasks asked with a prompt, answered by a decoder alone: as text to text, by the same flags."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.tiny_models import write_causal, write_text_to_text
from support.training_bench import BAD, FILLER, GOOD, a_batch, argv_of, results, write_documents

from pem_composition import checkpoint
from pem_composition.adapters import attach
from pem_composition.cli import main
from pem_composition.errors import PEMError
from pem_composition.evaluation.models import load_causal, load_tokenizer
from pem_composition.tasks.tokens import tokens_after
from pem_composition.training import runs

pytestmark = pytest.mark.slow

ANSWERS = {"negative": "sad w1", "positive": "good"}
CAUSAL = ("gpt2", "llama")


class DecoderBench:
    """A tiny decoder, rows, and a prompt whose answers have two tokens and one."""

    def __init__(self, bench, folder, name) -> None:
        self.bench, self.folder, self.name = bench, folder, name
        self.base = write_causal(folder / name, name, [" ".join([*GOOD, *BAD, *FILLER])])
        self.prompt = folder / "prompt.json"
        self.prompt.write_text(json.dumps({"template": "{sentence} ", "answers": ANSWERS}))
        self.rows = [json.loads(line) for line in bench.validation.read_text().splitlines()]
        self.documents = write_documents(folder / "documents.jsonl", 60, seed=5)

    def config(self, output, **changes):
        own = {
            "objective": "seq2seq", "model_name_or_path": self.base, "prompt": self.prompt,
            "output_dir": self.folder / output, "lora_dropout": None,
        }  # fmt: skip
        return self.bench.config(output, **(own | changes))

    def by_hand(self, module=None):
        """log p of each answer (n, 2) in float64, one row at a time, as lm-eval scores choices.

        Context and choice are tokenised in one text; what the context alone has is the context.
        """
        model, tokenizer, _ = load_causal(self.base, dtype=torch.float64)
        if module is not None:
            attach(model, module)
        return np.array([
            [log_p(model, tokenizer, row["sentence"], word) for word in ANSWERS.values()]
            for row in self.rows
        ])  # fmt: skip


@torch.no_grad()
def log_p(model, tokenizer, context, choice, *, special=True):
    whole = tokenizer(f"{context} {choice}", add_special_tokens=special).input_ids
    known = len(tokenizer(context, add_special_tokens=special).input_ids)
    log_tv = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_tv[t - 1, whole[t]].item() for t in range(known, len(whole)))


@pytest.fixture(scope="module", params=CAUSAL)
def decoder(request, bench, tmp_path_factory):
    return DecoderBench(bench, tmp_path_factory.mktemp("decoder"), request.param)


@pytest.fixture(scope="module")
def trained(decoder):
    return runs.run(decoder.config("lora", max_steps=40, eval_steps=20)).output_dir


def test_a_row_is_the_prompt_the_answer_and_the_end_and_only_the_answer_counts(decoder):
    start, batch, loss = a_batch(decoder.config("rows"))
    tokenizer, labels = start.tokenizer, batch["labels"]
    first = [tokenizer.bos_token_id] if decoder.name == "llama" else []
    closed = [[*tokens_after(tokenizer, w), tokenizer.eos_token_id] for w in ANSWERS.values()]
    for ids, mask, targets in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True):
        answer = targets[targets != -100].tolist()
        assert answer in closed
        read = [*ids[mask.bool()].tolist(), tokenizer.eos_token_id]
        assert read[-len(answer) :] == answer
        prompt = read[: -len(answer)]
        assert prompt[: len(first)] == first and prompt.count(0) == len(first), "one start token"
        assert tokenizer.decode(prompt) == tokenizer.decode(prompt).rstrip()
    model = start.model.eval().double()
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    log_btv = model(**inputs).logits.detach().log_softmax(-1)
    counted = labels != -100
    expected = -log_btv[counted].gather(1, labels[counted][:, None]).mean()
    assert loss(model(**inputs), labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_prompt_is_cut_and_its_answer_never(decoder, capsys):
    _, batch, _ = a_batch(decoder.config("cut", max_seq_length=10))
    told = capsys.readouterr().out
    assert "lose the end of the prompt" in told
    assert batch["input_ids"].shape[1] <= 10
    whole = a_batch(decoder.config("whole"))[1]
    assert whole["input_ids"].shape[1] > 10
    for mine, theirs in zip(batch["labels"], whole["labels"], strict=True):
        assert mine[mine != -100].tolist() == theirs[theirs != -100].tolist() != []
    with pytest.raises(PEMError, match="--max_seq_length: leaves no token of the prompt"):
        a_batch(decoder.config("none", max_seq_length=3))


def test_scores_are_those_by_hand_whatever_the_batch(decoder, trained, tmp_path, capsys):
    module = checkpoint.load(trained)
    assert module.config.extra["task_type"] == "CAUSAL_LM"
    own = decoder.by_hand(module)
    shares = np.exp(own) / np.exp(own).sum(1, keepdims=True)
    expected = own.argmax(1)
    base = decoder.by_hand().argmax(1)
    labels = np.array([row["label"] for row in decoder.rows])
    assert (expected != base).any(), "the module changes answers"
    assert results(trained)["eval_accuracy"] == pytest.approx(np.mean(expected == labels))
    for size in (1, 7):
        out = tmp_path / f"by{size}"
        argv = [
            "evaluate", "--objective", "seq2seq", "--model_name_or_path", decoder.base,
            "--adapter", trained, "--task_name", "sst2", "--prompt", decoder.prompt,
            "--validation_file", decoder.bench.validation, "--max_seq_length", "32",
            "--per_device_eval_batch_size", size, "--output_dir", out, "--do_predict",
        ]  # fmt: skip
        assert main([str(word) for word in argv]) == 0
        lines = (out / "predict_results_sst2.jsonl").read_text().splitlines()
        told = [json.loads(line) for line in lines]
        assert [list(ANSWERS).index(row["prediction"]) for row in told] == expected.tolist()
        found = [list(row["probabilities"].values()) for row in told]
        np.testing.assert_allclose(found, shares, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("answers", ["constrained", "free"])
def test_generation_answers_as_scoring_does(decoder, trained, answers, tmp_path):
    flags = {
        "objective": "seq2seq", "model_name_or_path": decoder.base, "adapter": trained,
        "task_name": "sst2", "prompt": decoder.prompt, "max_seq_length": 32,
        "validation_file": decoder.bench.validation, "output_dir": tmp_path,
    }  # fmt: skip
    assert main(["evaluate", *argv_of(flags)[1:]]) == 0
    scored = results(tmp_path)
    assert main(["evaluate", *argv_of(flags)[1:], "--answers", answers]) == 0
    written = results(tmp_path)
    if answers == "free":
        assert written["eval_exact_match"] == scored["eval_exact_match"]
        assert written["eval_invalid_share"] == scored["eval_invalid_share"]
    else:
        assert written["eval_invalid_share"] == 0


def test_a_grid_scores_modules_as_training_does_and_a_merge_as_by_hand(decoder, trained, tmp_path):
    other = runs.run(decoder.config("other", max_steps=10, eval_steps=10, seed=7)).output_dir
    flags = {
        "grid": "0 0.5 1", "save_path": tmp_path / "grid", "objective": "seq2seq",
        "model_name_or_path": decoder.base, "task_name": "sst2", "prompt": decoder.prompt,
        "validation_file": decoder.bench.validation, "max_seq_length": 32,
    }  # fmt: skip
    pairs = [(f"--{k}", *str(v).split()) for k, v in flags.items()]
    argv = ["--evaluate", *(word for pair in pairs for word in pair)]
    assert main(["merge", "--adapters", str(trained), str(other), *argv]) == 0
    lines = (tmp_path / "grid/results.jsonl").read_text().splitlines()
    found = [r for r in map(json.loads, lines) if r.get("split") == "validation"]
    for folder in (trained, other):
        (alone,) = (r for r in found if r["names"] == [folder.name])
        assert alone["scores"]["accuracy"] == results(folder)["eval_accuracy"]
    (merged,) = (r for r in found if len(r["names"]) == 2 and r["space"] == "parameter")
    answers = decoder.by_hand(checkpoint.load(tmp_path / "grid/selected_parameter")).argmax(1)
    right = [row["label"] == answer for row, answer in zip(decoder.rows, answers, strict=True)]
    assert merged["scores"]["accuracy"] == pytest.approx(np.mean(right))


def test_a_domain_is_read_block_by_block_and_each_token_counts_once(decoder):
    config = decoder.config(
        "blocks", target="next_block", block_size=8, prompt=None, task_name=None,
        train_file=decoder.documents, validation_file=decoder.documents, max_steps=10,
        max_seq_length=None,
    )  # fmt: skip
    folder = runs.run(config).output_dir
    model, tokenizer, _ = load_causal(decoder.base, dtype=torch.float64)
    attach(model, checkpoint.load(folder))
    texts = [json.loads(line)["text"] for line in decoder.documents.read_text().splitlines()]
    end, first = tokenizer.eos_token_id, [0] if decoder.name == "llama" else []
    stream = [t for x in texts for t in (*tokenizer(x, add_special_tokens=False).input_ids, end)]
    blocks = [stream[i : i + 8] for i in range(0, len(stream) // 8 * 8, 8)]
    total = 0.0
    for before, after in pairwise(blocks):
        row = [*first, *before, *after]
        with torch.no_grad():
            log_tv = model(torch.tensor([row])).logits[0].log_softmax(-1)
        total -= sum(log_tv[t - 1, row[t]].item() for t in range(len(row) - 8, len(row)))
    expected = total / (8 * (len(blocks) - 1))
    assert results(folder)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_an_initial_module_serves_both_objectives_of_a_decoder(decoder):
    """Modules of a task and of a domain are added, so they must adapt the same layers."""
    flags = {"model_name_or_path": decoder.base, "seed": 3}
    for objective in ("seq2seq", "causal_lm"):
        out = decoder.folder / f"init-{objective}"
        assert (
            main(["init", *argv_of({**flags, "objective": objective, "output_dir": out})[1:]]) == 0
        )
    one, two = (checkpoint.load(decoder.folder / f"init-{o}") for o in ("seq2seq", "causal_lm"))
    assert one.layers == two.layers and one.config == two.config
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name])


CHAT = (
    "{{ bos_token }}w1 {{ messages[0]['content'] }} w2 {% if add_generation_prompt %}w3{% endif %}"
)


@pytest.fixture
def chat(decoder, tmp_path):
    """The same decoder, whose tokenizer has a chat template that begins the text by itself."""
    base = tmp_path / "chat"
    shutil.copytree(decoder.base, base)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    return base


def test_a_chat_begins_once_and_asks_for_the_answer_however_it_is_cut(decoder, chat):
    config = decoder.config("chat", model_name_or_path=chat, template="chat")
    start, batch, _ = a_batch(config)
    tokenizer = start.tokenizer
    ending = tokenizer(" w2 w3", add_special_tokens=False).input_ids
    config = decoder.config("short", model_name_or_path=chat, template="chat", max_seq_length=20)
    short = a_batch(config)[1]
    # The longest answer has its end in the twentieth place, which is not read.
    assert short["input_ids"].shape[1] == 19 < batch["input_ids"].shape[1]
    for each in (batch, short):
        for ids, mask, targets in zip(
            each["input_ids"], each["attention_mask"], each["labels"], strict=True
        ):
            answer = targets[targets != -100].tolist()
            row = [*ids[mask.bool()].tolist(), tokenizer.eos_token_id]
            prompt = row[: -len(answer)]
            assert row[-len(answer) :] == answer
            assert prompt[0] == tokenizer.bos_token_id not in prompt[1:]
            assert prompt[-len(ending) :] == ending


def test_a_chat_is_scored_as_by_hand(decoder, chat, tmp_path):
    flags = {
        "objective": "seq2seq", "model_name_or_path": chat, "task_name": "sst2",
        "prompt": decoder.prompt, "max_seq_length": 64, "template": "chat",
        "validation_file": decoder.bench.validation, "output_dir": tmp_path, "do_predict": True,
    }  # fmt: skip
    assert main(["evaluate", *argv_of(flags)[1:]]) == 0
    model, tokenizer, _ = load_causal(chat, dtype=torch.float64)
    lines = (tmp_path / "predict_results_sst2.jsonl").read_text().splitlines()
    for row, line in zip(decoder.rows, lines, strict=True):
        turns = [{"role": "user", "content": row["sentence"] + " "}]
        read = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        scores = [log_p(model, tokenizer, read, w, special=False) for w in ANSWERS.values()]
        shares = np.exp(scores) / np.exp(scores).sum()
        told = list(json.loads(line)["probabilities"].values())
        np.testing.assert_allclose(told, shares, rtol=1e-4)


def test_a_chat_needs_a_decoder_and_a_template_of_its_tokenizer(decoder, tmp_path, capsys):
    flags = {
        "objective": "seq2seq", "model_name_or_path": decoder.base, "task_name": "sst2",
        "prompt": decoder.prompt, "validation_file": decoder.bench.validation, "template": "chat",
    }  # fmt: skip
    assert main(["evaluate", *argv_of(flags)[1:]]) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    t5 = write_text_to_text(tmp_path / "t5", [" ".join([*GOOD, *BAD, *FILLER])])
    assert main(["evaluate", *argv_of(flags | {"model_name_or_path": t5})[1:]]) == 2
    assert "an encoder-decoder reads the prompt as it stands" in capsys.readouterr().err
