"""``pem evaluate`` text to text: ways to answer, modules, language modelling, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.sweep_data import make_text
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from pem_composition import attach, load
from pem_composition.cli import evaluate
from pem_composition.errors import PEMError

QUESTION = "Is the following review positive or negative? {}"
WORDS = ("negative", "positive")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)
    return make_text(tmp_path_factory.mktemp("evaluate"))


def flags(bench, **changes):
    """Words of a command line; None leaves a flag out, True gives it alone."""
    own = {
        "model_name_or_path": bench.base,
        "objective": "seq2seq",
        "task_name": "sst2",
        "validation_file": bench.reviews[0],
    }
    words = []
    for name, value in (own | changes).items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def results(pem, bench, folder, **changes):
    done = pem("evaluate", *flags(bench, output_dir=folder, **changes))
    assert done.code == 0, done.err
    scores = json.loads((folder / "eval_results.json").read_text())
    return {name.removeprefix("eval_"): value for name, value in scores.items()}, done.out


class ByHand:
    """A freshly loaded model that reads one review at a time."""

    def __init__(self, bench, module=None):
        self.tokenizer = AutoTokenizer.from_pretrained(bench.base)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(bench.base).eval()
        if module is not None:
            attach(self.model, load(module, base=bench.base))
        rows = [json.loads(line) for line in bench.reviews[0].open()]
        self.gold = np.array([WORDS.index(row["label"]) for row in rows])
        self.texts = [QUESTION.format(row["sentence"]) for row in rows]
        self.answers = [self.tokenizer(word).input_ids for word in WORDS]  # with the end token

    @torch.no_grad()
    def scores(self, *, end):
        found = []
        for text in self.texts:
            ids = self.tokenizer(text, return_tensors="pt").input_ids
            for answer in self.answers:
                read = torch.tensor([[0, *answer[:-1]]])
                log_p = self.model(input_ids=ids, decoder_input_ids=read).logits[0].double()
                log_p = log_p.log_softmax(-1)
                tokens = answer if end else answer[:-1]
                found.append(sum(log_p[i, token].item() for i, token in enumerate(tokens)))
        return np.array(found).reshape(-1, 2)

    def written(self):
        out = []
        for text in self.texts:
            ids = self.tokenizer(text, return_tensors="pt").input_ids
            steps = max(map(len, self.answers))
            tokens = self.model.generate(ids, max_new_tokens=steps, do_sample=False)[0, 1:].tolist()
            out.append(self.answers.index(tokens) if tokens in self.answers else -1)
        return np.array(out)


@pytest.mark.slow
@pytest.mark.parametrize("with_module", [False, True])
def test_each_way_to_answer_is_scored_as_by_hand(pem, bench, tmp_path, with_module):
    module = bench.modules[0] if with_module else None
    hand, changes = ByHand(bench, module), {"adapter": module}
    lengths = {len(answer) for answer in hand.answers}
    scoring, out = results(pem, bench, tmp_path / "scoring", **changes)
    best = hand.scores(end=False).argmax(1)
    assert scoring["accuracy"] == pytest.approx(np.mean(best == hand.gold))
    nll = -hand.scores(end=False)[np.arange(len(best)), hand.gold].mean()
    assert scoring["loss"] == pytest.approx(nll, rel=1e-5)
    assert scoring["answers"] == "scoring" and "invalid_share" in out
    search, _ = results(pem, bench, tmp_path / "beam", answers="constrained", **changes)
    ended = hand.scores(end=len(lengths) > 1).argmax(1)
    assert search["accuracy"] == search["exact_match"] == pytest.approx(np.mean(ended == hand.gold))
    assert search["invalid_share"] == 0 and search["loss"] is None
    free, _ = results(pem, bench, tmp_path / "free", answers="free", **changes)
    written = hand.written()
    assert free["invalid_share"] == scoring["invalid_share"] == np.mean(written == -1)
    assert free["accuracy"] == free["exact_match"] == np.mean(written == hand.gold)
    assert scoring["exact_match"] == free["exact_match"]
    assert scoring.keys() == search.keys() == free.keys()
    assert scoring["samples"] == len(hand.gold) and 0 <= scoring["stderr"] < 0.5


def test_a_module_changes_the_scores(pem, bench, tmp_path):
    plain, _ = results(pem, bench, tmp_path / "plain")
    moved, _ = results(pem, bench, tmp_path / "moved", adapter=bench.modules[0])
    assert plain["loss"] != moved["loss"]


def test_the_prompt_may_be_a_file(pem, bench, tmp_path):
    answers = {"negative": "no", "positive": "yes or no"}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"template": "{text} w1", "answers": answers}))
    for how in ("scoring", "constrained", "free"):
        scores, _ = results(pem, bench, tmp_path / how, prompt=path, answers=how)
        assert set(scores["predicted_shares"]) == set(WORDS)


@pytest.mark.parametrize("with_module", [False, True])
def test_language_modelling_gives_the_model_s_own_loss(pem, bench, tmp_path, with_module):
    changes = {"target": "next_block", "block_size": 8, "task_name": None}
    changes |= {"validation_file": bench.documents, "max_eval_samples": 20}
    module = bench.modules[1] if with_module else None
    scores, out = results(pem, bench, tmp_path / "blocks", adapter=module, **changes)
    hand = ByHand(bench, module)
    texts = [json.loads(line)["text"] for line in bench.documents.open()][:20]
    stream = [token for text in texts for token in hand.tokenizer(text).input_ids]
    blocks = torch.tensor(stream[: len(stream) // 8 * 8]).reshape(-1, 8)
    with torch.no_grad():
        loss = hand.model(input_ids=blocks[:-1], labels=blocks[1:]).loss.item()
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert scores["samples"] == len(blocks) - 1
    assert "perplexity" in out and "answers" not in scores


@pytest.mark.parametrize("changes", [{}, {"answers": "free"}, {"answers": "constrained"}])
def test_bfloat16_and_the_layout_change_little(pem, bench, tmp_path, changes):
    full, _ = results(pem, bench, tmp_path / "full", **changes)
    small, _ = results(pem, bench, tmp_path / "small", per_device_eval_batch_size=3,
                       pad_to_max_length=True, **changes)  # fmt: skip
    assert small.keys() == full.keys()
    for name in full.keys() - {"runtime", "loss"}:
        assert small[name] == full[name], name
    reduced, _ = results(pem, bench, tmp_path / "reduced", bf16=True, **changes)
    if full["loss"] is not None:
        assert small["loss"] == pytest.approx(full["loss"], rel=1e-4)
        assert reduced["loss"] == pytest.approx(full["loss"], rel=0.05)
        assert reduced["loss"] != full["loss"]
    assert reduced["samples"] == full["samples"]


REFUSED = {
    "target": ({"objective": None, "target": "label"}, "--target: has no effect without"),
    "prompt": ({"objective": None, "prompt": "sst2"}, "--prompt: has no effect without"),
    "answers": (
        {"objective": None, "answers": "free"},
        "--answers: has no effect without --objective seq2seq --target label; found free",
    ),
    "block size": ({"block_size": 8}, "without --objective seq2seq --target next_block; found 8"),
    "answers of blocks": (
        {"target": "next_block", "answers": "scoring"},
        "--answers: has no effect without --objective seq2seq --target label",
    ),
    "prompt of blocks": (
        {"target": "next_block", "prompt": "sst2"},
        "--prompt: has no effect without --target label",
    ),
    "way": ({"answers": "greedy"}, "--answers: invalid choice: 'greedy'"),
    "length": ({"max_seq_length": 0}, "--max_seq_length: cannot be used; found 0"),
    "batch": ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size: cannot be used"),
    "no block": (
        {"target": "next_block", "block_size": 0},
        "--block_size: cannot be used; found 0, expected a number >= 1",
    ),
    "template": ({"prompt": "sst3"}, "unknown template; found 'sst3'"),
    "task": ({"prompt": "rte"}, "prompt rte: does not fit task sst2"),
    "blocks": (
        {"target": "next_block", "block_size": 4000},
        "--block_size: the documents fill fewer than two blocks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_is_refused_in_one_line(pem, bench, tmp_path, case):
    changes, words = REFUSED[case]
    done = pem("evaluate", *flags(bench, output_dir=tmp_path / "out", **changes))
    assert done.code == 2
    assert done.err.count("\n") == 1 and words in done.err
    assert not (tmp_path / "out").exists()


def test_answers_the_model_cannot_write_are_refused(pem, bench, tmp_path):
    answers = {"negative": "Ω", "positive": "yes"}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"template": "{text}", "answers": answers}))
    done = pem("evaluate", *flags(bench, prompt=path))
    assert done.code == 2 and done.err.count("\n") == 1
    assert "the tokenizer cannot write the answer 'Ω'" in done.err


def test_models_and_modules_of_another_kind_are_refused(pem, bench, tmp_path):
    from support.sweep_data import make

    other = make(tmp_path / "encoder")
    done = pem("evaluate", *flags(bench, model_name_or_path=other.base))
    assert done.code == 2 and "needs a model that writes; found a roberta" in done.err
    done = pem("evaluate", *flags(bench, adapter=other.modules[0]))
    assert done.code == 2 and done.err.count("\n") == 1
    empty = tmp_path / "dev.jsonl"
    empty.write_text('{"text": " "}\n')
    done = pem("evaluate", *flags(bench, target="next_block", validation_file=empty))
    assert done.code == 2 and "no text in any row" in done.err


def test_the_batch_is_chosen_by_the_device_unless_given(bench):
    from pem_composition.evaluation.padded import BATCH_ROWS

    config = evaluate.Config("x", task_name="sst2", objective="seq2seq")
    assert config.per_device_eval_batch_size is None and config.answers is None
    assert BATCH_ROWS == {"cpu": 16, "cuda": 64}
    with pytest.raises(PEMError, match="no rows to score"):
        evaluate.Config("x")
