"""The GGUF language model: every value and token as the file says, in a folder without quants."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from support.package_files import fetched

from pem_composition.errors import DataError

gguf = pytest.importorskip("gguf", reason="needs the extra [offline]")
from pem_composition.offline import smollm2  # noqa: E402

CONTROL, NORMAL = 3, 1
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "h e", "l l", "Ġ t", "Ġt he"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def byte_letters() -> list[str]:
    """GPT-2's letters for the bytes: themselves where they can be seen, else those from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]


TOKENS = [*SPECIAL, *sorted(byte_letters()), *(m.replace(" ", "") for m in MERGES)]
STORED = {path: name for name, path in smollm2.NAMES.items()}


def stored_name(name: str) -> str:
    """GGUF's name of a tensor of transformers' Llama."""
    parts = name.split(".")
    if parts[1] != "layers":
        return {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"
    return f"blk.{parts[2]}.{STORED['.'.join(parts[3:-1])]}.weight"


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half beside row i of its second half, as GGUF rotates them."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            for half in (0, 1):
                out[head * size + 2 * i + half] = weight[head * size + half * size // 2 + i]
    return out


def write_gguf(path, model, quantise: bool, pre: str = "smollm") -> dict[str, np.ndarray]:
    """A file as llama.cpp's converter writes it; the values it holds by transformers' names."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in TOKENS])
    writer.add_token_merges(MERGES)
    for role, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_chat_template(TEMPLATE)
    values = {}
    for name, tensor in model.model.state_dict(prefix="model.").items():
        value = tensor.numpy()
        kind = gguf.GGMLQuantizationType.F32
        if quantise and value.ndim == 2:
            kinds = gguf.GGMLQuantizationType
            kind = kinds.Q8_0 if "embed" in name else kinds.Q4_1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        stored = in_pairs(value, heads[part]) if part in heads else value
        data = gguf.quantize(stored, kind)
        writer.add_tensor(stored_name(name), data, raw_dtype=kind)
        values[stored_name(name)] = data if quantise and value.ndim == 2 else value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def small_llama():
    """Rows of 32 and 64 values, as the blocks of 32 need."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def unpacked(path, out):
    out.mkdir()
    smollm2.write_llama(gguf.GGUFReader(path), out)
    return out


IDS = torch.tensor([[1, 40, 5, 77, 200, 3, 9, 60]])


def test_a_file_of_float32_comes_back_bit_for_bit(tmp_path, one_thread):
    from transformers import AutoModelForCausalLM

    model = small_llama()
    write_gguf(tmp_path / "m.gguf", model, quantise=False)
    folder = unpacked(tmp_path / "m.gguf", tmp_path / "out")
    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, model(IDS).logits)


def decoded(data: np.ndarray, block: int) -> np.ndarray:
    """Values of rows of blocks, one by one: 34 bytes are Q8_0, 20 bytes are Q4_1."""
    rows = []
    for row in data:
        values = []
        for start in range(0, len(row), block):
            piece = row[start : start + block].tobytes()
            scale = np.float32(np.frombuffer(piece, np.float16, 1)[0])
            if block == 34:
                values += [scale * np.float32(q) for q in np.frombuffer(piece, np.int8, offset=2)]
                continue
            least = np.float32(np.frombuffer(piece, np.float16, 1, offset=2)[0])
            low_then_high = [b & 15 for b in piece[4:]] + [b >> 4 for b in piece[4:]]
            values += [scale * np.float32(q) + least for q in low_then_high]
        rows.append(values)
    return np.array(rows, np.float32)


def test_quantised_values_are_those_of_their_blocks_and_of_the_reader_of_transformers(
    tmp_path, one_thread
):
    from transformers import AutoModelForCausalLM

    model = small_llama()
    values = write_gguf(tmp_path / "m.gguf", model, quantise=True)
    folder = unpacked(tmp_path / "m.gguf", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in found.model.state_dict(prefix="model.").items():
        stored = values[stored_name(name)]
        if stored.dtype == np.uint8:
            stored = decoded(stored, 34 if "embed" in name else 20)
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            ours = in_pairs(tensor.numpy(), heads) if heads else tensor.numpy()
            np.testing.assert_array_equal(ours, stored)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, theirs(IDS).logits)
    assert found.dtype == torch.float32


def test_the_folder_is_free_of_quantisation_and_can_be_saved_again(tmp_path):
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", small_llama(), quantise=True)
    folder = unpacked(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] and config["dtype"] == "float32"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")


def test_digits_are_words_of_their_own_and_every_text_comes_back(tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf", small_llama(), quantise=False)
    tokenizer = AutoTokenizer.from_pretrained(unpacked(tmp_path / "m.gguf", tmp_path / "out"))
    assert tokenizer.tokenize("the end\n\n12") == [
        "t", "he", "Ġ", "e", "n", "d", "ĊĊ", "1", "2",
    ]  # fmt: skip
    # A reader without the rule for digits takes the second line break apart from the first.
    for text in ("  naïve 1984, \U0001f600\n\n\n 7 é", "<|im_start|>user\nhello<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_end|>").input_ids == [2]
    roles = ("bos", "eos", "pad", "unk")
    assert [getattr(tokenizer, f"{role}_token_id") for role in roles] == [1, 2, 2, 0]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"


def test_another_kind_of_file_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", small_llama(), quantise=False, pre="llama-bpe")
    with pytest.raises(DataError, match="found llama gpt2 llama-bpe, expected llama gpt2 smollm"):
        unpacked(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(DataError, match=r"unknown tensor; found blk\.0\.ffn_gate_inp\.weight"):
        smollm2._name("blk.0.ffn_gate_inp.weight")


# --- the real model, where it has been fetched ---


@pytest.mark.slow
def test_the_real_model_knows_a_capital_and_reads_wikipedia(one_thread):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetched("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("The capital of France is Paris")
    rows = (fetched("wikitext2") / "test.jsonl").read_text().splitlines()
    text = "\n\n".join(json.loads(row)["text"] for row in rows[:200])
    windows = tokenizer(text, verbose=False, return_tensors="pt").input_ids[0, :2048].view(4, 512)
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.item() for w in windows]
    assert 25 < math.exp(sum(losses) / 4) < 50
