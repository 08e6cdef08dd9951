"""The story model: the file's weights and llama2.c's arithmetic, its tokens by llama2.c's rule."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.package_files import fetched, tar_of

from pem_composition import offline
from pem_composition.errors import DataError
from pem_composition.offline import stories

MARKS = ["<unk>", "\n<s>\n", "\n</s>\n"]
BYTES = [chr(b) for b in range(256)]
SPACES = -1e9
MERGED = [" t", "he", " a", "in", " the", "1 ", "er", "ana", "an", "ét", "na", "12", "--", "---"]
RUNS = ["  ", "    ", "   "]
LETTERS = [*"etanihr1-", "é", " "]
# Characters come last, as in the real file; a run of spaces counts as the worst of all.
PIECES = {
    **{text: -1.0 - i for i, text in enumerate(MERGED)},
    **dict.fromkeys(RUNS, SPACES),
    **{text: -100.0 - i for i, text in enumerate(LETTERS)},
    " ": SPACES,
}
TOKENS = [*((text, 0.0) for text in (*MARKS, *BYTES)), *PIECES.items()]
SIZES = {
    "width": 24, "feed_forward": 17, "layers": 3, "heads": 4, "key_value_heads": 2,
    "vocabulary": len(TOKENS), "length": 33,
}  # fmt: skip


def random_weights(sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of the checkpoint by llama2.c's names, in its order."""
    width, inner, layers, heads, keys, vocabulary, length = sizes.values()
    half = width // heads // 2
    shapes = {
        "embedding": (vocabulary, width), "att_norm": (layers, width),
        "wq": (layers, width, width), "wk": (layers, keys * 2 * half, width),
        "wv": (layers, keys * 2 * half, width), "wo": (layers, width, width),
        "ffn_norm": (layers, width), "w1": (layers, inner, width), "w2": (layers, width, inner),
        "w3": (layers, inner, width), "norm": (width,),
        "cos": (length, half), "sin": (length, half),
    }  # fmt: skip
    random = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes.items():
        scale, centre = (0.1, 1.0) if "norm" in name else (shape[-1] ** -0.5, 0.0)
        out[name] = (centre + scale * random.normal(size=shape)).astype("<f4")
    return out


def tokenizer_bin(tokens: list[tuple[str, float]]) -> bytes:
    coded = [(text.encode(), score) for text, score in tokens]
    longest = max(len(text) for text, _ in coded)
    rows = (struct.pack("<fi", score, len(text)) + text for text, score in coded)
    return struct.pack("<i", longest) + b"".join(rows)


def checkpoint(sizes: dict[str, int], weights: dict[str, np.ndarray]) -> bytes:
    return struct.pack("<7i", *sizes.values()) + b"".join(w.tobytes() for w in weights.values())


WEIGHTS = random_weights(SIZES)
FILE = checkpoint(SIZES, WEIGHTS) + tokenizer_bin(TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stories")
    stories.write_llama(FILE, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# --- the weights ---


def forward(sizes: dict[str, int], weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits by llama2.c's rules, float64, one position after the other."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    size = sizes["width"] // sizes["heads"]
    group = sizes["heads"] // sizes["key_value_heads"]
    keys, values = ([[] for _ in range(sizes["layers"])] for _ in range(2))

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def rotate(x, position):
        out = x.copy()
        for i in range(0, len(x), 2):
            angle = position / 10000 ** ((i % size) / size)
            out[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
            out[i + 1] = x[i] * math.sin(angle) + x[i + 1] * math.cos(angle)
        return out

    logits = []
    for position, token in enumerate(ids):
        x = w["embedding"][token].copy()
        for layer in range(sizes["layers"]):
            y = norm(x, w["att_norm"][layer])
            query = rotate(w["wq"][layer] @ y, position)
            keys[layer].append(rotate(w["wk"][layer] @ y, position))
            values[layer].append(w["wv"][layer] @ y)
            mixed = np.empty_like(x)
            for head in range(sizes["heads"]):
                here = slice(head * size, (head + 1) * size)
                shared = slice(head // group * size, (head // group + 1) * size)
                scores = [query[here] @ k[shared] / math.sqrt(size) for k in keys[layer]]
                share = np.exp(np.array(scores) - max(scores))
                share /= share.sum()
                mixed[here] = sum(s * v[shared] for s, v in zip(share, values[layer], strict=True))
            x += w["wo"][layer] @ mixed
            y = norm(x, w["ffn_norm"][layer])
            gate = w["w1"][layer] @ y
            x += w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ y))
        logits.append(w["embedding"] @ norm(x, w["norm"]))
    return np.array(logits)


def loaded(folder: Path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def test_the_logits_are_those_of_llama2c(folder, one_thread):
    ids = [1, *np.random.default_rng(1).integers(0, len(TOKENS), SIZES["length"] - 1).tolist()]
    with torch.no_grad():
        found = loaded(folder)(torch.tensor([ids])).logits[0].numpy()
    expected = forward(SIZES, WEIGHTS, ids)
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_every_weight_is_the_files_bit_for_bit(folder):
    model = loaded(folder)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    names = {
        "att_norm": "input_layernorm", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm", "w1": "mlp.gate_proj", "w2": "mlp.down_proj",
        "w3": "mlp.up_proj",
    }  # fmt: skip
    np.testing.assert_array_equal(state["model.embed_tokens.weight"], WEIGHTS["embedding"])
    np.testing.assert_array_equal(state["model.norm.weight"], WEIGHTS["norm"])
    size = SIZES["width"] // SIZES["heads"]
    for layer in range(SIZES["layers"]):
        path = f"model.layers.{layer}"
        for stored, name in names.items():
            np.testing.assert_array_equal(state[f"{path}.{name}.weight"], WEIGHTS[stored][layer])
        for stored, name in (("wq", "q_proj"), ("wk", "k_proj")):
            found = state[f"{path}.self_attn.{name}.weight"]
            for row, values in enumerate(WEIGHTS[stored][layer]):
                head, (pair, second) = row // size, divmod(row % size, 2)
                np.testing.assert_array_equal(
                    found[head * size + second * size // 2 + pair], values
                )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32


def test_the_package_is_read_by_its_member(tmp_path, folder):
    package = tmp_path / "package.tgz"
    package.write_bytes(tar_of({"package/dist/llama2.data": b"no", stories.MEMBER: FILE}))
    out = tmp_path / "out"
    out.mkdir()
    offline.ASSETS["stories-15m"].unpack([package], out)
    for path in folder.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


# --- the tokenizer ---


def encode(pieces: list[tuple[str, float]], text: str) -> list[int]:
    """llama2.c's bpe_encode: characters, or bytes; then the best pair, the leftmost of equals."""
    ids = {piece: 259 + i for i, (piece, _) in enumerate(pieces[259:])}
    known = [piece for piece, _ in pieces]
    out = []
    for letter in f" {text}" if text else "":
        out += [ids[letter]] if letter in ids else [3 + byte for byte in letter.encode()]

    def merged(i: int) -> tuple[float, int]:
        left, right = out[i], out[i + 1]
        number = ids.get(known[left] + known[right]) if min(left, right) >= 259 else None
        return (-math.inf, 0) if number is None else (pieces[number][1], number)

    pairs = [merged(i) for i in range(len(out) - 1)]
    scores = [score for score, _ in pairs]
    while scores and (best := max(scores)) > -math.inf:
        i = scores.index(best)
        out[i : i + 2] = [pairs[i][1]]
        del pairs[i], scores[i]
        for j in (i - 1, i):
            if 0 <= j < len(pairs):
                pairs[j] = merged(j)
                scores[j] = pairs[j][0]
    return [1, *out]


TEXTS = (
    "", " ", "the rain", "  the   end  ", "naïve été 12 1984", "\U0001f600 the\n\n\tend\r\n",
    "banana--- ananas", "\x00\x7fÿĀ",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_llama2c(tokenizer, text):
    assert tokenizer(text).input_ids == encode(TOKENS, text)


@given(st.text(st.sampled_from("aehint1-é x\U0001f600\n"), max_size=40))
def test_any_text_has_the_tokens_of_llama2c_and_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == encode(TOKENS, text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_run_of_spaces_grows_from_the_left(tokenizer):
    for length in range(1, 20):
        text = "n" + length * " " + "n"
        assert tokenizer(text).input_ids == encode(TOKENS, text)


def test_the_sign_for_a_space_is_a_space_as_in_sentencepiece(tokenizer):
    assert tokenizer("a\u2581the").input_ids == tokenizer("a the").input_ids


def test_the_marks_of_a_text(tokenizer):
    roles = ("bos", "eos", "pad", "unk")
    assert [getattr(tokenizer, f"{role}_token_id") for role in roles] == [1, 1, 0, 0]
    assert tokenizer("</s>").input_ids == [1, 2]
    batch = tokenizer(["the", "the the"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert [sum(row) for row in batch["attention_mask"]] == [2, 3]
    assert batch["input_ids"][0][-1] == 0
    assert tokenizer("a", "in").input_ids == [*encode(TOKENS, "a"), *encode(TOKENS, "in")]


# --- what is refused ---

MODEL = len(checkpoint(SIZES, WEIGHTS))


def header(**changes: int) -> bytes:
    return struct.pack("<7i", *(SIZES | changes).values()) + FILE[28:]


def with_token(number: int, text: str) -> bytes:
    tokens = [*TOKENS[:number], (text, 0.0), *TOKENS[number + 1 :]]
    return FILE[:MODEL] + tokenizer_bin(tokens)


def with_byte(position: int, value: int) -> bytes:
    return FILE[:position] + bytes([value]) + FILE[position + 1 :]


BAD = {
    "empty": (b"", "llama2.c file: truncated; found 0, expected 28"),
    "header cut": (FILE[:27], "llama2.c file: truncated; found 27, expected 28"),
    "model cut": (FILE[: MODEL - 1], f"truncated; found {MODEL - 1}, expected {MODEL}"),
    "no tokenizer": (FILE[:MODEL], f"token 0 of {len(TOKENS)} cannot be read"),
    "tokenizer cut": (FILE[:-1], f"token {len(TOKENS) - 1} of {len(TOKENS)} cannot be read"),
    "trailing byte": (FILE + b"\0", "1 bytes after the last piece"),
    "more layers": (header(layers=2**31 - 1), "truncated"),
    "fewer layers": (header(layers=2), "llama2.c tokenizer: token 0 of"),
    "untied": (header(vocabulary=-len(TOKENS)), "another kind of model"),
    "no heads": (header(heads=0), "another kind of model"),
    "odd heads": (header(heads=8), "sizes do not fit each other"),
    "heads without keys": (header(key_value_heads=3), "sizes do not fit each other"),
    "few tokens": (header(vocabulary=258), "sizes do not fit each other"),
    "bytes by name": (with_token(3, "<0x00>"), r"vocabulary, token 3; found '<0x00>', expected"),
    "other marks": (with_token(1, "<s>"), "another kind of vocabulary, token 1"),
    "a piece twice": (with_token(260, " t"), "a piece stands twice"),
    "no text": (with_token(259, ""), "a piece of 0 bytes"),
    "not UTF-8": (with_byte(len(FILE) - 1, 0xFF), "can't decode byte 0xff"),
    "longer than the longest": (with_byte(MODEL, 2), "a piece of 5 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, name):
    data, expected = BAD[name]
    with pytest.raises(DataError) as caught:
        stories.write_llama(data, tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# --- the real model, where it has been fetched ---

STORY = """Once upon a time, there was a little boy named Tom. Tom had a red ball. He liked to \
play with the ball in the park with his dog, Max.

One day, Tom threw the ball too high and it got stuck in a big tree. Tom was sad. "Max, can you \
help me get my ball?" he asked. Max barked and jumped, but the tree was too tall.

Then a kind bird saw them. The bird flew up and pushed the ball with its beak. The ball fell down \
to the ground. Tom was very happy. "Thank you, bird!" he said. From that day on, Tom, Max and the \
bird were good friends."""


def pieces_of(folder: Path) -> list[tuple[str, float]]:
    """Token texts as in tokenizer.bin; the scores of the real one fall with the id."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    texts = [text.replace("\u2581", " ") for text in sorted(vocabulary, key=vocabulary.get)]
    return [(text, -1e9 if not text.strip(" ") else 259.0 - i) for i, text in enumerate(texts)]


@pytest.mark.slow
def test_the_real_tokenizer_reads_as_llama2c_does():
    from transformers import AutoTokenizer

    folder, rows = fetched("stories-15m"), (fetched("wikitext2") / "test.jsonl").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = pieces_of(folder)
    assert len(pieces) == 32_000
    lines = [json.loads(row)["text"] for row in rows.splitlines()[:200]]
    runs = ["x" + length * character + "x" for character in " -=." for length in range(1, 40)]
    for text in (*lines, STORY, *TEXTS, *runs):
        ids = tokenizer(text, verbose=False).input_ids
        assert ids == encode(pieces, text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.slow
def test_the_real_model_tells_a_story_and_ends_it(one_thread):
    from transformers import AutoTokenizer

    folder = fetched("stories-15m")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), loaded(folder)
    assert sum(p.numel() for p in model.parameters()) == 15_191_712
    prompt = "Once upon a time, there was a little girl named"
    out = model.generate(
        **tokenizer(prompt, return_tensors="pt"), max_new_tokens=240, do_sample=False
    )[0]
    text = tokenizer.decode(out, skip_special_tokens=True)
    assert text.startswith(f"{prompt} Lily. She loved to play outside in the sunshine.")
    assert out[-1] == 1 and len(out) < 240
    ids = tokenizer(STORY, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(ids, labels=ids)
    assert 2 < math.exp(found.loss.item()) < 4
    end = found.logits[0, -1].softmax(-1)
    assert end[1] > 0.8 and end[2] < 1e-9
