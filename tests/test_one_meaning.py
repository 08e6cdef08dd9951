"""One module means one change of the weights, whatever does it: every way against live PEFT."""

from __future__ import annotations

import functools
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")
from support import one_meaning as om

import pem_composition as pem
from pem_composition.adapters import set_multiplier
from pem_composition.checkpoint import fold_checkpoint, load
from pem_composition.checkpoint.conversion import convert
from pem_composition.errors import IncompatibleModules
from pem_composition.safe_files import read_json

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "one_meaning.py"
EVERY = frozenset(om.WAYS)
CONVERT, EXTRACT = frozenset({"convert"}), frozenset({"extract"})
SUMS = frozenset(
    {"parameter space", "delta space", "rank", "negations", "sum and difference", "average"}
)
FOLDS = frozenset({"fold", "fold, its own class", "extract"})
# What may be refused: the sentence, the requests, the ways, and (if not all) the models.
REFUSALS: list[tuple[str, str, frozenset[str], str]] = [
    ("DoRA scales the base's weights", "dora", SUMS | CONVERT, ""),
    ("DoRA on the Conv1D layer", "dora", FOLDS, "gpt2.*|bert to gpt2"),
    ("tensors differ that the module cannot hold", "dora", EXTRACT, ""),
    ("trained biases cannot be represented", "bias", EVERY, ""),
    ("LoRA on an embedding cannot be represented", "on the embedding", EVERY, ""),
    ("is one matrix, no stack of experts", "all linear.*", EVERY, "mixtral"),
    ("no linear layer to extract|tensors differ that", "one stack|two stacks", EXTRACT, "gpt oss"),
    ("convolution layers cannot be represented", "patches", EVERY, "vit"),
    ("adapter-transformers layout (cannot represent|does not cover)", ".*", CONVERT, ""),
    ("tensors differ that the module cannot hold", ".*(saved|head|on the).*", EXTRACT, ""),
    ("tensors differ that the module cannot hold", "all linear.*|.*task", EXTRACT, ""),
    # one saved part inside another, which PEFT itself cannot open again
    ("keys of a live model cannot be represented", ".*head and norm", EVERY, "bert mlm"),
    ("no linear layer to extract", "on the (output|head).*", EXTRACT, ""),
    # a tuned model whose tied weights differ, beside a base that stores them once
    ("does not fit the base", "(ia3 )?(saved|on the).*", EXTRACT, ""),
    # transformers renames what these files hold when it loads them
    ("its class renames what the file holds", ".*", FOLDS, "vit|vit to gpt2|mixtral"),
]  # fmt: skip


def allowed(v: om.Verdict) -> bool:
    return any(
        re.search(said, v.said)
        and re.fullmatch(requests, v.request)
        and v.way in ways
        and (not models or re.fullmatch(models, v.model))
        for said, requests, ways, models in REFUSALS
    )


def judge(found: list[om.Verdict]) -> Counter[str]:
    """Count the verdicts; none may be wrong, and none refused for a reason that is not listed."""
    wrong = [v for v in found if v.word == "wrong"]
    refused = [v for v in found if v.word == "refused" and not allowed(v)]
    assert not wrong, "\n".join(map(str, wrong))
    assert not refused, "\n".join(map(str, refused))
    return Counter(v.word for v in found)


def wanted(model: str, request: str, quick: bool) -> list[str]:
    return plan()[model, request] if (request == quick_request(model)) == quick else []


@functools.cache
def quick_request(model: str) -> str:
    """One request of a model, another one for each model, of those that have an answer.

    2: then PEFT takes the one of every model.
    """
    answered = [
        request
        for (name, request), (way, *others) in plan().items()
        if name == model
        and not others
        and not (request.startswith("ia3") and way in ("rank", "extract"))  # of LoRA alone
        and not any(
            re.fullmatch(requests, request) and way in ways and re.fullmatch(models or ".*", model)
            for _, requests, ways, models in REFUSALS
        )
    ]
    return answered[(2 + 5 * list(om.BY_NAME).index(model)) % len(answered)]


@functools.cache
def plan() -> dict[tuple[str, str], list[str]]:
    """The way of each model and request: the one that both met least; all for a model's own."""
    met: Counter[tuple[str, str]] = Counter()
    out = {}
    for name, model in om.BY_NAME.items():
        for request in om.requests(model):
            ways = sorted(om.WAYS, key=lambda w: met[request, w] + met[name, w])
            out[name, request] = ways if request in model.more else ways[:1]
            met.update((n, w) for n in (name, request) for w in out[name, request])
    return out


@pytest.mark.parametrize("name", om.BY_NAME)
def test_a_module_means_the_same(name: str, tmp_path: Path, one_thread: None) -> None:
    counts = judge(list(om.verdicts(tmp_path, [name], functools.partial(wanted, quick=True))))
    assert counts["right"]


@pytest.mark.slow
@pytest.mark.parametrize("name", om.BY_NAME)
def test_the_other_requests(name: str, tmp_path: Path, one_thread: None) -> None:
    """With those above: every model meets every request and way, every request meets every way.

    All three at once are the cells of ``scripts/one_meaning.py``.
    """
    counts = judge(list(om.verdicts(tmp_path, [name], functools.partial(wanted, quick=False))))
    assert counts["right"] >= 10


@pytest.mark.parametrize("words, names", [([], list(om.BY_NAME)), (["t5 untied"], ["t5 untied"])])
def test_the_script_counts_the_models_that_are_named(words, names, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *words])
    assert runpy.run_path(str(SCRIPT))["models"]() == names


@pytest.mark.parametrize(
    "word, code, said", [("--help", 0, "usage: .*t5 untied"), ("gtp2", 2, "no such model: .'gtp2'")]
)
def test_the_script_says_which_models_there_are(word, code, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), word])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT))["models"]()
    assert stop.value.code == code and re.search(said, "".join(capsys.readouterr()), re.S)


# --- beyond the product ---------------------------------------------------------------------------


def peft_module(model, folder: Path, **options):
    """A module that PEFT makes on a model, its numbers jittered; returns what the model says."""
    import peft

    with om.quiet():
        options = {"r": 2, "init_lora_weights": False, **options}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
        g = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=g))
        adapted.save_pretrained(folder)
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("both", [False, True])
def test_added_tokens(name: str, both: bool, tmp_path: Path) -> None:
    """A vocabulary that grew: PEFT stores both embeddings, whatever modules_to_save says."""
    m = om.BY_NAME[name]
    base, rows = om.base_folder(m, tmp_path), om.V + 3
    grown = om.opened(m, base)
    grown.resize_token_embeddings(rows)
    grown.save_pretrained(tmp_path / "grown")
    saved = [m.embedding, m.output] if both else [m.embedding]
    adapted = peft_module(
        grown, tmp_path / "a", target_modules=list(m.attention[:1]), modules_to_save=saved
    )
    want = om.output(adapted, m.inputs)
    module = load(tmp_path / "a")
    small = om.opened(m, base).eval()
    with pytest.raises(IncompatibleModules, match=rf"resize_token_embeddings\({rows}\)"):
        pem.attach(small, module, allow_base_mismatch=True)
    small.resize_token_embeddings(rows)
    before, said = om.snapshot(small), om.output(small, m.inputs)
    with pem.attach(small, module, allow_base_mismatch=True):
        assert om.difference(om.output(small, m.inputs), want) < om.TOLERANCE
    om.same_model(small, before)
    assert torch.equal(om.output(small, m.inputs), said)
    options = {"allow_base_mismatch": True}
    fold_checkpoint("a", {"a": tmp_path / "a"}, tmp_path / "grown", tmp_path / "f", **options)
    folded = om.opened(m, tmp_path / "f").eval()
    assert om.difference(om.output(folded, m.inputs), want) < om.TOLERANCE
    if name in ("t5", "bart"):  # the two halves have embeddings of their own, of the old size
        with pytest.raises(IncompatibleModules, match="resize the base first"):
            fold_checkpoint("a", {"a": tmp_path / "a"}, base, tmp_path / "small", **options)
        return
    fold_checkpoint("a", {"a": tmp_path / "a"}, base, tmp_path / "small", **options)
    folded = om.opened(m, tmp_path / "small").eval()
    assert folded.config.vocab_size == rows
    assert om.difference(om.output(folded, m.inputs), want) < om.TOLERANCE


def test_an_untied_fold_says_so_and_stores_both(tmp_path: Path) -> None:
    m = om.BY_NAME["qwen2"]
    base = om.base_folder(m, tmp_path)
    peft_module(
        om.opened(m, base), tmp_path / "a", target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
    )  # fmt: skip
    fold_checkpoint("a", {"a": tmp_path / "a"}, base, tmp_path / "f")
    config = read_json(tmp_path / "f" / "config.json", tmp_path)
    assert config["tie_word_embeddings"] is False
    own, old = (load_file(d / "model.safetensors") for d in (tmp_path / "f", base))
    assert torch.equal(own["lm_head.weight"], old["model.embed_tokens.weight"])
    assert not torch.equal(own["model.embed_tokens.weight"], old["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "bert to gpt2", "bart"])
def test_shards_and_bfloat16_fold_to_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    """A sharded base gives the tensors of one file; bfloat16 is float32, rounded once."""
    m = om.BY_NAME[name]
    base = om.base_folder(m, tmp_path)
    om.opened(m, base).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    peft_module(
        om.opened(m, base), tmp_path / "a", target_modules=[m.attention[-1]],
        modules_to_save=[m.embedding],
    )  # fmt: skip
    options = {"allow_base_mismatch": True}  # the names of the folders differ
    for folder, out in ((base, "one"), (tmp_path / "shards", "two")):
        fold_checkpoint("a", {"a": tmp_path / "a"}, folder, tmp_path / out, dtype=dtype, **options)
    fold_checkpoint("a", {"a": tmp_path / "a"}, base, tmp_path / "wide")
    one, two, wide = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two", "wide"))
    assert one.keys() == two.keys() == wide.keys()
    for n, tensor in one.items():
        assert torch.equal(tensor, two[n]), n
        assert torch.equal(tensor, wide[n].to(getattr(torch, dtype))), n


def test_what_a_class_renames_is_refused_and_the_advice_is_true(tmp_path: Path) -> None:
    """transformers 5 opens ViT's files under other names: fold in memory and save, as is said."""
    m = om.BY_NAME["vit"]
    base = om.base_folder(m, tmp_path)
    adapted = peft_module(
        om.opened(m, base), tmp_path / "a", target_modules=["q_proj"],
        modules_to_save=["classifier", "layernorm_before"],
    )  # fmt: skip
    want = om.output(adapted, m.inputs)
    with pytest.raises(IncompatibleModules, match=r"fold in memory \(pem\.fold\), and save"):
        fold_checkpoint("a", {"a": tmp_path / "a"}, base, tmp_path / "f")
    model = om.opened(m, base).eval()
    pem.fold(model, load(tmp_path / "a"), permanent=True)
    model.save_pretrained(tmp_path / "saved")
    assert om.difference(om.output(om.opened(m, tmp_path / "saved").eval(), m.inputs), want) < 1e-4


@pytest.mark.parametrize("first", [0, 1])
def test_parts_of_several_modules_come_off_in_any_order(first: int, tmp_path: Path) -> None:
    """Two modules that save the tied embedding or the output layer, folded; the last one counts."""
    m = om.BY_NAME["llama tied"]
    base = om.base_folder(m, tmp_path)
    for i, saved in enumerate((["embed_tokens", "lm_head"], ["lm_head"])):
        peft_module(
            om.opened(m, base), tmp_path / str(i), target_modules=["q_proj"], modules_to_save=saved
        )
    model = om.opened(m, base).eval()
    before = om.snapshot(model)
    modules = [load(tmp_path / str(i)) for i in range(2)]
    alone = []
    for module in modules:
        with pem.attach(model, module):
            alone.append(om.output(model, m.inputs))
    folds = [pem.fold(model, module) for module in modules]
    twice = pytest.raises(IncompatibleModules, match="two attached modules bring a head")
    with pem.attach(model, modules[0], name="a"), twice:
        pem.attach(model, modules[1], name="b")
    folds[first].restore()
    torch.testing.assert_close(om.output(model, m.inputs), alone[1 - first])
    folds[1 - first].restore()
    om.same_model(model, before)


@pytest.mark.parametrize("way", ["attach", "fold", "save", "delta space"])
def test_feedforward_modules_name_ends_of_words(way: str, tmp_path: Path) -> None:
    m = om.BY_NAME["t5"]
    options = {"target_modules": ["o", "wo"], "feedforward_modules": ["o"]}
    case = om.made(m, "ia3", options, om.base_folder(m, tmp_path), tmp_path / "module")
    assert om.difference(om.WAYS[way](case, tmp_path), case.want) < om.TOLERANCE


def test_a_dora_module_has_no_sum_anywhere(tmp_path: Path) -> None:
    m = om.BY_NAME["llama"]
    base = om.base_folder(m, tmp_path)
    om.made(m, "lora", {"target_modules": ["q_proj"], "use_dora": True}, base, tmp_path / "a")
    a, model = load(tmp_path / "a"), om.fresh(m, base)
    for use in (
        lambda: 0.5 * a,
        lambda: a - a,
        lambda: pem.negate(a),
        lambda: pem.compose('layers(a, "*", 0.5)', {"a": a}),
        lambda: pem.compose("ties(a, a)", {"a": a}),
        lambda: pem.compare([a, a]),
        lambda: fold_checkpoint("0.5*a", {"a": tmp_path / "a"}, base, tmp_path / "f"),
        lambda: convert(tmp_path / "a", tmp_path / "v", format="vllm"),
    ):
        with pytest.raises(IncompatibleModules, match=r"no sum; found use_dora.*\(pem extract\)"):
            use()
    with pytest.raises(IncompatibleModules, match="DoRA is not trained here"):
        pem.attach(model, a, trainable=True)
    switch = pytest.raises(pem.PEMError, match="a DoRA module cannot be switched or scaled")
    with pem.attach(model, a, name="a"), switch:
        set_multiplier(model, "a", 0.5)
