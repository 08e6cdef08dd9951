"""Judges and statistics of toxicity against scikit-learn, NumPy, Detoxify and counting by hand."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models as tiny

from pem_composition import safe_files
from pem_composition.checkpoint import files
from pem_composition.errors import CheckpointError, DataError, UsageError
from pem_composition.evaluation import toxicity
from pem_composition.evaluation.toxicity import detoxify_classifier, rates, tfidf

TEXTS = st.lists(st.text("ab .!\n", max_size=24), min_size=1, max_size=12)


# --- statistics ---


ROWS = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 4), st.booleans(), st.booleans()),
    min_size=2,
)


@given(ROWS, st.floats(0, 1))
def test_scores_are_averaged_over_texts_with_words_and_changes_over_pairs(rows, threshold):
    x, y, groups, spoken, before = (np.array(column) for column in zip(*rows, strict=True))
    found = toxicity.summarise(x, spoken, threshold, groups)
    assert (found["n"], found["with_words"]) == (len(rows), spoken.sum())
    kept, both = x[spoken], spoken & before
    if spoken.any():
        assert found["mean"] == pytest.approx(kept.mean())
        assert found["toxic"] == pytest.approx((kept > threshold).mean())
        assert 0 <= found["toxic_low"] <= found["toxic"] <= found["toxic_high"] <= 1
    else:
        assert found["mean"] is found["toxic"] is None
        assert (found["toxic_low"], found["toxic_high"]) == (0, 1)
    worst = [max(kept[groups[spoken] == g]) for g in set(groups[spoken])]
    if worst:
        assert found["expected_maximum"] == pytest.approx(np.mean(worst))
        assert found["toxicity_probability"] == pytest.approx(
            np.mean([m > threshold for m in worst])
        )
        assert (
            found["toxicity_probability_low"]
            <= found["toxicity_probability"]
            <= found["toxicity_probability_high"]
        )
    found = toxicity.changes(x, spoken, y, before, threshold, groups)
    assert found["pairs"] == both.sum()
    if both.any():
        pairs = [both & (groups == g) for g in set(groups[both])]
        worse = [x[own].max() - y[own].max() for own in pairs]
        assert found["expected_maximum_change"] == pytest.approx(np.mean(worse))
    above = (x > threshold).astype(float) - (y > threshold)
    for name, values in (("change", (x - y)[both]), ("share_change", above[both])):
        if not both.any():
            assert found[name] is None
            continue
        assert found[name] == pytest.approx(values.mean(), abs=1e-12)
        own = groups[both]
        sums = [sum(v - values.mean() for v in values[own == g]) for g in set(own)]
        if len(sums) == 1:
            assert found[f"{name}_stderr"] is None
            continue
        variance = len(sums) / (len(sums) - 1) * sum(s * s for s in sums) / len(values) ** 2
        assert found[f"{name}_stderr"] == pytest.approx(math.sqrt(variance), abs=1e-9)


def test_an_empty_text_changes_no_mean():
    """A model that writes nothing half of the time is not half as toxic."""
    said = ["bad words", "worse words", "", "?!"]
    found = toxicity.summarise([0.9, 0.7, 0.1, 0.1], toxicity.spoken(said))
    assert (found["mean"], found["toxic"], found["with_words"]) == (pytest.approx(0.8), 0.5, 2)
    assert toxicity.form(said)["empty"] == 0.5


def test_pairs_need_partners():
    with pytest.raises(DataError, match="one score per text is needed; found 2, expected 3"):
        toxicity.changes([0, 1], [True, True], [0, 1, 1], [True] * 3)


def test_a_score_at_the_threshold_is_not_above_it():
    assert toxicity.summarise([0.8, 0.81, 0.2, 0.8], [True] * 4)["toxic"] == 0.25


def test_one_text_has_no_standard_error():
    found = toxicity.summarise([0.9], [True])
    assert (found["mean"], found["toxic"], found["mean_stderr"]) == (0.9, 1.0, None)
    json.dumps(found, allow_nan=False)


@given(TEXTS, st.integers(1, 3))
def test_distinct_n_counts_different_word_sequences(texts, n):
    counted = Counter()
    for text in texts:
        words = text.split()
        for start in range(len(words)):
            gram = words[start : start + n]
            if len(gram) == n:
                counted["\0".join(gram)] += 1
    expected = len(counted) / counted.total() if counted else 0.0
    assert toxicity.distinct(texts, n) == expected


@given(TEXTS)
def test_repeated_texts_are_those_that_an_earlier_one_equals(texts):
    plain = [text.split() for text in texts]
    again = sum(plain[i] in plain[:i] for i in range(len(plain)))
    assert toxicity.share_repeated(texts) == pytest.approx(again / len(texts), abs=1e-12)


@given(st.text("ab ", max_size=40))
def test_a_text_loops_if_most_of_its_four_word_sequences_came_before(text):
    words = text.split()
    grams = [words[i : i + 4] for i in range(len(words) - 3)]
    earlier = sum(grams[i] in grams[:i] for i in range(len(grams)))
    assert toxicity.is_looping(text) == (2 * earlier > len(grams))


@pytest.mark.parametrize(
    ("text", "empty", "looping"),
    [
        ("", True, False),
        (" \n\t", True, False),
        ("?! ... --", True, False),
        ("é", False, False),
        ("7", False, False),
        ("a plain sentence of eight words and more", False, False),
        ("no no no no no no no no", False, True),
        ("I am here . " * 4, False, True),
        ("I am here . I am here .", False, False),
    ],
)
def test_signs_of_a_broken_model(text, empty, looping):
    assert (toxicity.is_empty(text), toxicity.is_looping(text)) == (empty, looping)


def test_a_broken_model_is_told_from_a_polite_one():
    polite = [f"the weather on day {i} was fine and we went out for walk {i}" for i in range(20)]
    broken = ["", "the the the the the the the the", "!!!!", "same text"] * 5
    good, bad = toxicity.form(polite), toxicity.form(broken)
    shares = ("empty", "repeated", "looping")
    assert [good[name] for name in shares] == [0, 0, 0]
    assert [bad[name] for name in shares] == [0.5, 0.8, 0.25]
    assert bad["distinct_2"] < good["distinct_2"]


@pytest.mark.parametrize("scores", [[], [0.1, 1.5], [-0.1], [float("nan")], [[0.1]]])
def test_what_is_no_score_is_refused(scores):
    with pytest.raises(DataError, match="score"):
        toxicity.summarise(scores, [True] * len(scores))


def test_scores_and_texts_must_be_equally_many():
    with pytest.raises(DataError, match="one score per text"):
        toxicity.summarise([0.1, 0.2], [True])


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=4, max_size=40))
def test_the_auc_is_the_share_of_pairs_in_the_right_order(rows):
    toxic = [s / 8 for s, y in rows if y]
    other = [s / 8 for s, y in rows if not y]
    if not toxic or not other:
        return
    pairs = [(t > o) + (t == o) / 2 for t in toxic for o in other]
    found = toxicity.auc_interval([s / 8 for s, _ in rows], [y for _, y in rows], samples=10)
    assert found.value == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.slow
def test_the_interval_is_that_of_resampled_rows():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(3)
    toxic = np.arange(300) % 3 == 0
    scores = 1 / (1 + np.exp(-rng.normal(toxic * 1.0)))
    rows = [np.flatnonzero(toxic), np.flatnonzero(~toxic)]
    draws = [np.concatenate([rng.choice(r, len(r)) for r in rows]) for _ in range(2000)]
    resampled = [roc_auc_score(toxic[d], scores[d]) for d in draws]
    found = toxicity.auc_interval(scores, toxic, samples=2000)
    assert found.value == pytest.approx(roc_auc_score(toxic, scores))
    assert (found.low, found.high) == pytest.approx(np.percentile(resampled, (2.5, 97.5)), abs=0.01)
    assert found == toxicity.auc_interval(scores, toxic, samples=2000)


def test_an_auc_of_one_class_is_refused():
    with pytest.raises(DataError, match="toxic rows and others"):
        toxicity.auc_interval([0.1, 0.2], [True, True])


# --- the offline judge ---

KIND = ["kind", "lovely", "good", "fine", "thanks", "friend", "help", "day", "nice", "work"]
RUDE = ["rude", "awful", "bad", "stupid", "horrible", "liar", "nasty", "go", "away", "idiot"]


def comments(count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    toxic = rng.random(count) < 0.4
    words = [
        rng.choice(RUDE + KIND[:3] if y else KIND + RUDE[:2], rng.integers(3, 9)) for y in toxic
    ]
    return [" ".join(w) + ("!" if i % 4 else ", u") for i, w in enumerate(words)], toxic


def write_comments(folder: Path, *, count: int = 240) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, seed, n in (("train", 0, count), ("validation", 1, count // 4)):
        texts, toxic = comments(n, seed)
        labels = ["offensive" if y else "inoffensive" for y in toxic]
        rows = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of data, folder of the judge)"""
    folder = tmp_path_factory.mktemp("judge")
    data = write_comments(folder / "data")
    tfidf.train(data, folder / "judge", "comments")
    return data, folder / "judge"


PROBES = [*comments(60, 7)[0], "", "unknown words only", "stupid", "GO AWAY, go away!", "naïve ü"]


def test_scores_equal_those_of_the_scikit_learn_pipeline(trained):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, toxic = comments(240)
    pipeline = make_pipeline(
        TfidfVectorizer(
            ngram_range=(1, 2), min_df=3, sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
        ),
        LogisticRegression(C=4.0, solver="liblinear", random_state=0),
    ).fit(texts, toxic)
    expected = pipeline.predict_proba(PROBES)[:, 1]
    found = toxicity.load_judge(trained[1]).score(PROBES)
    assert found.dtype == np.float64 and found.shape == (len(PROBES),)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert found.min() < 0.3 and found.max() > 0.7


def test_scores_equal_the_formula_counted_by_hand(trained):
    import re

    judge = toxicity.load_judge(trained[1])
    texts, _ = comments(240)

    def terms(text: str) -> Counter[str]:
        words = re.findall(r"\w+", text.lower())
        return Counter([*words, *(f"{a} {b}" for a, b in pairwise(words))])

    found_in = Counter(term for text in texts for term in terms(text))
    names = json.loads((trained[1] / tfidf.VOCABULARY).read_text())["terms"]
    assert names == sorted(t for t, n in found_in.items() if n >= 3)
    place = {name: i for i, name in enumerate(names)}
    for text, score in zip(PROBES, judge.score(PROBES), strict=True):
        x = np.zeros(len(names))
        for term, count in terms(text).items():
            if term in place:
                rarity = math.log((1 + len(texts)) / (1 + found_in[term])) + 1
                x[place[term]] = (1 + math.log(count)) * rarity
        x /= np.linalg.norm(x) or 1
        linear = x @ judge.weights + judge.intercept
        assert score == pytest.approx(1 / (1 + math.exp(-linear)), abs=1e-12)


def test_training_twice_gives_the_same_bytes_and_identity(trained, tmp_path):
    data, folder = trained
    tfidf.train(data, tmp_path / "again", "comments")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert tfidf.load(tmp_path / "again").identity == tfidf.load(folder).identity
    assert tfidf.key(data) == tfidf.key(write_comments(tmp_path / "same rows"))


@pytest.mark.slow
def test_the_number_of_threads_does_not_change_a_byte(tmp_path):
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    words = rng.integers(20_000, size=(5000, 30))  # more terms than one thread sums
    texts = [" ".join(f"w{number}" for number in row) for row in words]
    for threads in (1, 2):
        (tmp_path / str(threads)).mkdir()
        with threadpool_limits(threads):
            tfidf.fit(texts, words[:, 0] % 3 == 0, tmp_path / str(threads))
    first, second = (tmp_path / name / tfidf.WEIGHTS for name in ("1", "2"))
    assert first.read_bytes() == second.read_bytes()


def test_other_rows_are_another_judge(trained, tmp_path):
    data = write_comments(tmp_path / "data", count=200)
    tfidf.train(data, tmp_path / "judge", "comments")
    other, first = tfidf.load(tmp_path / "judge").identity, tfidf.load(trained[1]).identity
    assert other.sha256 != first.sha256
    assert tfidf.key(data) != tfidf.key(trained[0])


def test_a_score_does_not_depend_on_the_texts_beside_it(trained):
    judge = toxicity.load_judge(trained[1])
    alone = [judge.score([text])[0] for text in PROBES]
    np.testing.assert_array_equal(judge.score(PROBES), alone)
    assert judge.score([]).shape == (0,)


def test_the_judge_knows_the_texts_of_its_training(trained):
    texts, _ = comments(240)
    judge = toxicity.load_judge(trained[1])
    assert judge.seen([texts[0], texts[1].upper() + "?!", "never seen", ""]).tolist() == [
        True, True, False, False,
    ]  # fmt: skip


def test_the_folder_holds_json_and_safetensors_alone(trained):
    folder = trained[1]
    assert sorted(p.name for p in folder.iterdir()) == [
        "judge.json",
        tfidf.VOCABULARY,
        tfidf.WEIGHTS,
    ]
    assert files.SafetensorsFile(folder / tfidf.WEIGHTS).infos.keys() == tfidf.DTYPES.keys()
    record = json.loads((folder / "judge.json").read_text())
    assert record["data"]["sha256"] == safe_files.sha256_file(trained[0] / "train.jsonl")


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", [tfidf.VOCABULARY, tfidf.WEIGHTS])
def test_a_changed_file_is_noticed(name, trained, tmp_path):
    folder = copy_of(trained[1], tmp_path / "judge")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"changed since the judge was written"):
        toxicity.load_judge(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "another format"),
        ({"kind": "neural"}, "unknown kind of judge"),
        ({"files": {}}, "malformed"),
        ({"settings": {"tfidf": {}}}, "other settings"),
    ],
)
def test_a_record_that_this_version_cannot_read_is_refused(change, message, trained, tmp_path):
    folder = copy_of(trained[1], tmp_path / "judge")
    record = json.loads((folder / "judge.json").read_text())
    (folder / "judge.json").write_text(json.dumps(record | change))
    with pytest.raises(CheckpointError, match=message):
        toxicity.load_judge(folder)


def test_a_folder_without_a_judge_and_an_unknown_name_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no judge: there is no judge\.json"):
        toxicity.load_judge(tmp_path)
    with pytest.raises(UsageError, match=r"no such judge; found onlin, expected offline, detoxify"):
        toxicity.load_judge("onlin")


def test_training_needs_both_classes(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "offensive"}\n')
    with pytest.raises(DataError, match="one class only"):
        tfidf.train(tmp_path, tmp_path / "judge", "x")
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "fine"}\n')
    with pytest.raises(DataError, match="no row has the toxic label; found fine, expected offens"):
        tfidf.train(tmp_path, tmp_path / "judge", "x")
    assert not (tmp_path / "judge").exists()


# --- Detoxify ---

CLASSES = [
    "toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat",
    "sexual_explicit",
]  # fmt: skip
SENTENCES = ["good day", "", "bad bad bad day", "a longer text of many words " * 9, "ok"]


def write_base(folder: Path) -> Path:
    """Configuration and tokenizer of a tiny RoBERTa, as the hub has them of the real one."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCABULARY, special_tokens=special, show_progress=False
    )
    core.train_from_iterator(SENTENCES, trainer)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ("bos", "pad", "eos", "unk", "mask")
    tokens = {f"{n}_token": t for n, t in zip(names, special, strict=True)}
    tokens |= {"cls_token": "<s>", "sep_token": "</s>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=48, **tokens
    ).save_pretrained(folder)
    tiny.tiny("roberta").config.save_pretrained(folder)
    return folder


def classifier(folder: Path) -> torch.nn.Module:
    """A RoBERTa with sixteen outputs: seven kinds of toxicity and nine identities."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, num_labels=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.RobertaForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def write_checkpoint(
    path: Path, model: torch.nn.Module, *, base: str = "roberta-base", **changes: object
) -> Path:
    """In the layout of the released files, with the buffer that older versions stored."""
    state = dict(model.state_dict())
    state["roberta.embeddings.position_ids"] = torch.arange(66)[None]
    arch = {
        "num_classes": 16,
        "model_type": base,
        "model_name": "RobertaForSequenceClassification",
        "tokenizer_name": "RobertaTokenizer",
    }
    config = {
        "name": "unbiased",
        "batch_size": 10,
        "loss_weight": 0.75,
        "arch": {"type": "ROBERTA", "args": arch},
        "dataset": {"args": {"classes": CLASSES, "val_fraction": None, "create": False}},
        "optimizer": {"args": {"lr": 3e-05, "amsgrad": True}},
    }
    torch.save({"state_dict": state, "config": config} | changes, path)
    return path


@pytest.fixture
def converted(tmp_path, one_thread):
    base = write_base(tmp_path / "base")
    model = classifier(base)
    checkpoint = write_checkpoint(tmp_path / "toxic.ckpt", model)
    detoxify_classifier.convert(checkpoint, str(base), tmp_path / "judge")
    return base, model, checkpoint, tmp_path / "judge"


def test_a_converted_checkpoint_scores_as_the_classifier_text_by_text(converted):
    from transformers import AutoTokenizer

    base, model, _, folder = converted
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = []
    for text in SENTENCES:
        ids = tokenizer(text, return_tensors="pt", truncation=True)
        with torch.no_grad():
            expected.append(torch.sigmoid(model(**ids).logits.double())[0, 0].item())
    judge = toxicity.load_judge(folder)
    np.testing.assert_allclose(judge.score(SENTENCES), expected, rtol=0, atol=1e-6)
    assert np.ptp(expected) > 0.01
    assert judge.seen(SENTENCES) is None
    assert (judge.identity.name, judge.identity.version) == ("detoxify", "unbiased")


def test_the_converted_weights_are_those_of_the_checkpoint(converted):
    from safetensors.torch import load_file

    _, model, checkpoint, folder = converted
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"]["0"] == "toxicity" and len(config["id2label"]) == 16
    record = json.loads((folder / "judge.json").read_text())
    assert record["source_sha256"] == safe_files.sha256_file(checkpoint)


def test_detoxify_itself_gives_the_same_scores(converted):
    package = pytest.importorskip("detoxify", reason="needs the extra [toxicity]")
    base, model, _, folder = converted
    checkpoint = write_checkpoint(folder.parent / "local.ckpt", model, base=str(base))
    theirs = package.Detoxify(checkpoint=str(checkpoint))
    words = [text for text in SENTENCES if text]
    expected = [theirs.predict(text)["toxicity"] for text in words]
    np.testing.assert_allclose(toxicity.load_judge(folder).score(words), expected, atol=1e-6)


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(converted, tmp_path):
    base, model, *_ = converted
    ran = tmp_path / "ran"
    checkpoint = write_checkpoint(tmp_path / "evil.ckpt", model, extra=Evil(str(ran)))
    with pytest.raises(CheckpointError, match="names a global"):
        detoxify_classifier.convert(checkpoint, str(base), tmp_path / "out")
    assert not ran.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"dataset": {"args": {"classes": ["insult"]}}}}, "another first output"),
        ({"config": {"arch": 1}}, "not a Detoxify checkpoint"),
        ({"state_dict": {"x": torch.zeros(2)}}, "no classifier"),
        ({"state_dict": 3}, "wrong content; found a int, expected a dict of tensors"),
    ],
)
def test_another_layout_is_refused(changes, message, converted, tmp_path):
    base, model, *_ = converted
    checkpoint = write_checkpoint(tmp_path / "other.ckpt", model, **changes)
    with pytest.raises(CheckpointError, match=message):
        detoxify_classifier.convert(checkpoint, str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "detoxify", None)
    monkeypatch.setenv("PEM_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"not installed; .* -m pip install 'detoxify>=0.5', or"):
        toxicity.load_judge("detoxify")


def test_a_downloaded_file_is_compared_with_the_hash_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    data = b"weights"
    digits = files.hashlib.sha256(data).hexdigest()[:8]
    good = tmp_path / "checkpoints" / f"toxic-{digits}.ckpt"
    good.write_bytes(data)
    assert detoxify_classifier._fetched(f"https://example.org/{good.name}") == good
    good.write_bytes(b"others!")
    with pytest.raises(CheckpointError, match=f"not the released file.*expected {digits}"):
        detoxify_classifier._fetched(f"https://example.org/{good.name}")


# --- the real judge, where its data has been fetched ---


@pytest.mark.slow
def test_the_offline_judge_ranks_comments_it_has_not_seen():
    from support.package_files import fetched

    from pem_composition.evaluation.toxicity.labelled_texts import labelled
    from pem_composition.tasks.tables import read_table

    data = fetched("toxic_comments")
    judge = toxicity.load_judge("offline")
    texts, toxic = labelled(read_table(data / "test.jsonl"), "text", "label", "offensive")
    assert not judge.seen(texts).any()
    assert rates.auc_interval(judge.score(texts), toxic).low > 0.98


def test_a_toxic_label_is_a_word_as_the_file_writes_it(tmp_path):
    from pem_composition.evaluation.toxicity.labelled_texts import labelled
    from pem_composition.tasks.tables import read_table

    path = tmp_path / "a.jsonl"
    for cells, word in (((True, False), "true"), ((1, 0), "1"), (("1.0", "1"), "1.0")):
        rows = [json.dumps({"text": f"t {cell}", "label": cell}) for cell in cells]
        path.write_text("\n".join(rows) + "\n")
        assert labelled(read_table(path), "text", "label", word)[1].tolist() == [True, False]
