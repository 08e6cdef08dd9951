"""How the cost of arithmetic grows, beside reading the inputs and writing as much as the output.

One axis at a time: modules, rank, width, layers of LoRA modules, gigabytes of whole models. Every
point is a process of its own, which does the operation once on small inputs (imports, first calls)
and then on those of the point: seconds, processor seconds, and the peak of resident memory above
what it held before. The bound does the same with safetensors: reads every input, writes as many
bytes as the output has, and flushes them as the operation does. An exponent is the slope of the log
of processor seconds (above those of the smallest point; other work on the machine changes them less
than seconds) over the log of the axis, on its upper half. Bytes read and written grow as the axis,
and so does the bound.

    python scripts/benchmarks/scaling.py                    # LoRA axes, and 0.25 to 2 GB
    python scripts/benchmarks/scaling.py --operations compose TSV --axes modules rank --most 16
    python scripts/benchmarks/scaling.py --axes gigabytes --gigabytes 0.25 1 4 16
    python scripts/benchmarks/scaling.py --llama70b         # two modules, r = 64, all linear layers
    python scripts/benchmarks/scaling.py --mixtral          # two modules, r = 16, stacks of experts

Rows go to OUT/scaling.jsonl and OUT/scaling-exponents.jsonl after every point; a point that is
there is not measured again. ``python scripts/results.py put scaling OUT/scaling.jsonl`` (and the
same for scaling-exponents), then ``write``, brings them into docs/results/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MB, GB = 1 << 20, 10**9

LLAMA70B = {  # name: inputs, outputs
    "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (8192, 1024),
    "self_attn.v_proj": (8192, 1024), "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (8192, 28672), "mlp.up_proj": (8192, 28672), "mlp.down_proj": (28672, 8192),
}  # fmt: skip
MIXTRAL = {"gate_up_proj": (4096, 28672), "down_proj": (14336, 4096)}  # of each of its 8 experts
EXPERTS = 8
HIDDEN, MIDDLE, VOCABULARY = 1024, 2816, 1024  # small, so that a model's size is its blocks'
SHARD = 5 * 10**8


@dataclass(frozen=True)
class Point:
    """Shapes of the inputs: LoRA modules, and for whole models their size."""

    modules: int = 4
    rank: int = 16
    width: int = 1024
    layers: int = 4
    gigabytes: float = 0.0
    llama70b: bool = False
    mixtral: bool = False

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block that modules change."""
        return LLAMA70B if self.llama70b else {"self_attn.q_proj": (self.width, self.width)}


BASE = Point()
SMALL = Point(modules=2, rank=2, width=64, layers=1)
AXES: dict[str, tuple[float, ...]] = {
    "modules": (2, 4, 8, 16, 32, 64),
    "rank": (8, 16, 32, 64, 128, 256),
    "width": (1024, 2048, 4096, 8192),
    "layers": (4, 8, 16, 32, 64),
    "gigabytes": (0.25, 0.5, 1, 2),
}
LORA = {
    "compose": ["--space", "delta"],
    "recompress": ["--space", "delta", "--rank", "{rank}"],
    "TIES": ["-w", "ties"],
    "TIES, core": ["-w", "ties", "--setting", "form=core"],
    "TSV": ["-w", "tsv"],
    "KnOTS": ["-w", "knots"],
}
WHOLE = ("fold", "streamed sum")
OPERATIONS = (*LORA, *WHOLE)
DENSE = {"TIES": 2048}  # it forms dW and takes its SVD: widths up to this
# Growth of the operation's own work where one axis alone grows, as its page states it.
EXPECTED = {
    "compose": "as the bound; its certificate as (modules rank)^2 width layers",
    "recompress": "(modules rank)^2 width layers",
    "TIES": "modules width^2 layers, and the SVD of a width x width matrix a layer",
    "TIES, core": "(modules rank)^2 (width + modules rank + modules) layers",
    "TSV": "(modules rank)^2 (width + modules rank) layers",
    "KnOTS": "(modules rank)^2 (width + modules rank + modules) layers",
    "fold": "as the bound", "streamed sum": "as the bound",
}  # fmt: skip


# --- inputs ---------------------------------------------------------------------------------------


def make(folder: Path, point: Point) -> None:
    """Modules m0, m1, ... and, with gigabytes, a base and two models tuned from it."""
    if point.gigabytes:
        for number, name in enumerate(("base", "t0", "t1")):
            make_model(folder / name, point.gigabytes / 3, number)
        layers = len(list(blocks(point.gigabytes / 3)))
        make_module(folder / "m0", replace(BASE, width=HIDDEN, layers=layers), 0)
        return
    for seed in range(point.modules):
        (make_experts if point.mixtral else make_module)(folder / f"m{seed}", point, seed)


def make_module(path: Path, point: Point, seed: int) -> None:
    """A LoRA module with factors of the size that training gives them; bfloat16 at 70B."""
    import torch

    from pem_composition.config import BaseIdentity, LoraConfig
    from pem_composition.module import PEM

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for i in range(point.layers):
        for name, (inputs, outputs) in point.shapes().items():
            layer, r = f"model.layers.{i}.{name}", point.rank
            tensors[f"{layer}.lora_A"] = torch.randn(r, inputs, generator=generator) / inputs**0.5
            tensors[f"{layer}.lora_B"] = torch.randn(outputs, r, generator=generator) / 100
    targets = tuple(name.rpartition(".")[2] for name in point.shapes())
    config = LoraConfig(r=point.rank, alpha=point.rank, target_modules=targets)
    dtype = "bfloat16" if point.llama70b else "float32"
    PEM(tensors, config, BaseIdentity(name="a-base")).save(path, dtype=dtype)


def make_experts(path: Path, point: Point, seed: int) -> None:
    """A LoRA module on stacks of experts as PEFT writes it (target_parameters), in bfloat16."""
    import torch
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(seed), {}
    count = EXPERTS * point.rank
    for i in range(point.layers):
        # The parameter that the model declares first is the innermost.
        for (inputs, outputs), inner in zip(MIXTRAL.values(), (".base_layer", ""), strict=True):
            key = f"base_model.model.model.layers.{i}.mlp.experts{inner}.lora_"
            A = torch.randn(count, inputs, generator=generator) / inputs**0.5
            B = torch.randn(outputs, count, generator=generator) / 100
            tensors |= {f"{key}A.weight": A.bfloat16(), f"{key}B.weight": B.bfloat16()}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": point.rank, "lora_alpha": point.rank, "target_modules": [],
        "use_rslora": False, "use_dora": False,
        "target_parameters": [f"mlp.experts.{name}" for name in MIXTRAL],
        "base_model_name_or_path": "a-base", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))


def blocks(gigabytes: float) -> Iterator[dict[str, tuple[int, int]]]:
    """Blocks of a model in bfloat16, embeddings aside."""
    shapes = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"}
    shapes |= {f"mlp.{x}_proj": (MIDDLE, HIDDEN) for x in ("gate", "up")}
    shapes["mlp.down_proj"] = (HIDDEN, MIDDLE)
    size = 2 * sum(a * b for a, b in shapes.values())
    for _ in range(max(1, round((gigabytes * GB - 4 * HIDDEN * VOCABULARY) / size))):
        yield shapes


def make_model(folder: Path, gigabytes: float, number: int) -> None:
    """A Llama of that size in shards; its weights repeat, which costs a sum nothing less."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(number)
    numbers = (torch.randn(MIDDLE * HIDDEN) / 50).bfloat16()
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    for name in ("model.embed_tokens", "lm_head"):
        shapes[f"{name}.weight"] = (VOCABULARY, HIDDEN)
    for i, block in enumerate(blocks(gigabytes)):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (HIDDEN,)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        if sum(t.nbytes for t in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = numbers[: math.prod(shape)].reshape(shape).clone()
    index = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE, "num_attention_heads": 16, "vocab_size": VOCABULARY,
        "num_hidden_layers": len(list(blocks(gigabytes))), "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


# --- a point, in a process of its own -------------------------------------------------------------


def command(operation: str, folder: Path, point: Point) -> list[str]:
    """The arguments of ``pem``."""
    out = ["-p", str(folder / "out"), "-o"]
    models = [str(folder / name) for name in ("t0", "t1")]
    if operation == "streamed sum":
        return ["merge", "--full_merge", "-a", *models, "-m", str(folder / "base"),
                "--coefficients", "0.4", "0.4", "--dtype", "bfloat16", *out]  # fmt: skip
    if operation == "fold":
        return ["fold", "m", "--module", f"m={folder / 'm0'}", "-m", str(folder / "base"),
                "--allow_base_mismatch", *out]  # fmt: skip
    flags = [flag.format(rank=point.rank) for flag in LORA[operation]]
    if point.llama70b or point.mixtral:
        flags += ["--dtype", "bfloat16"]
    modules = [str(folder / f"m{i}") for i in range(point.modules)]
    return ["merge", "-a", *modules, *flags, *out]


def read_by(operation: str, folder: Path, point: Point) -> list[Path]:
    """The files that it reads."""
    names = [f"m{i}" for i in range(point.modules)]
    if operation in WHOLE:
        names = ["base", "m0"] if operation == "fold" else ["base", "t0", "t1"]
    return [f for name in names for f in sorted((folder / name).glob("*.safetensors"))]


def measure(calls: Sequence[Sequence[str]]) -> None:
    """The first call to warm up, then the second; prints what it took."""
    import contextlib
    import io
    import time

    import torch  # noqa: F401  (not a cost of the operation)

    def run(call: Sequence[str]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            code = bound(call[1:]) if call[0] == "bound" else cli.main(call)
        if code:
            raise SystemExit(code)

    from pem_composition import cli

    run(calls[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    start, used = time.perf_counter(), time.process_time()
    run(calls[1])
    took = {"seconds": time.perf_counter() - start, "processor": time.process_time() - used}
    print(json.dumps(took | {"peak": (memory("VmHWM") - before) / MB}))


def memory(name: str) -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def bound(arguments: Sequence[str]) -> int:
    """Read every tensor of the files, write as many bytes as told, flush them."""
    from safetensors import safe_open

    out, size, *files = arguments
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensors.get_tensor(name).clone()
    part = bytes(8 * MB)
    with Path(out).open("wb") as written:
        for _ in range(int(size) // len(part)):
            written.write(part)
        written.write(part[: int(size) % len(part)])
        written.flush()
        os.fsync(written.fileno())
    return 0


def process(calls: Sequence[Sequence[str]]) -> dict[str, float]:
    """What ``measure`` prints, from a new process."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(calls)], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(calls[1])}: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


# --- all points -----------------------------------------------------------------------------------


def points(args: argparse.Namespace) -> Iterator[tuple[str, float, Point, list[str]]]:
    """Axis, its value, the shapes, and the operations to measure there."""
    if args.llama70b:
        shape = Point(modules=2, rank=64, layers=args.llama70b, llama70b=True)
        names = [o for o in ("compose", "recompress", "TSV") if o in args.operations]
        yield "Llama-70B layers", args.llama70b, shape, names
        return
    if args.mixtral:
        shape = Point(modules=2, layers=args.mixtral, mixtral=True)
        names = [o for o in ("compose", "recompress", "TSV") if o in args.operations]
        yield "Mixtral layers", args.mixtral, shape, names
        return
    for axis in args.axes:
        for value in args.gigabytes if axis == "gigabytes" else AXES[axis]:
            if axis != "gigabytes" and args.most and value > args.most * min(AXES[axis]):
                continue
            kept = [o for o in args.operations if (o in WHOLE) == (axis == "gigabytes")]
            kept = [o for o in kept if axis != "width" or value <= DENSE.get(o, value)]
            if kept:
                number = float(value) if axis == "gigabytes" else int(value)
                yield axis, value, replace(BASE, **{axis: number}), kept


def row(axis: str, value: float, operation: str, folders: Sequence[Path], runs: int,
        point: Point) -> dict[str, object]:  # fmt: skip
    """Measure a point: medians over the runs, the bound after each."""
    small, folder = folders
    took, least = [], []
    files = read_by(operation, folder, point)
    warm = replace(SMALL, gigabytes=point.gigabytes and 0.01)
    for _ in range(runs):
        calls = [command(operation, small, warm), command(operation, folder, point)]
        took.append(process(calls))
        written = sum(f.stat().st_size for f in (folder / "out").glob("*.safetensors"))
        copy = ["bound", str(folder / "copy"), str(written), *map(str, files)]
        little = ["bound", str(folder / "copy"), "8", *map(str, read_by(operation, small, warm))]
        least.append(process([little, copy]))
    shutil.rmtree(folder / "out")
    (folder / "copy").unlink()

    def middle(name: str, found: Sequence[Mapping[str, float]], digits: int) -> float:
        return round(statistics.median(one[name] for one in found), digits)

    return {
        "name": f"scaling/{operation.lower().replace(', ', '-').replace(' ', '-')}"
        f"-{axis.lower().replace(' ', '-')}-{value:g}",
        "operation": operation, "axis": axis, "at": value, "runs": runs,
        "read_mb": round(sum(f.stat().st_size for f in files) / MB, 1),
        "written_mb": round(written / MB, 1),
        "seconds": middle("seconds", took, 3), "processor": middle("processor", took, 3),
        "bound": middle("seconds", least, 3),
        "ratio": round(middle("seconds", took, 6) / middle("seconds", least, 6), 2),
        "peak_mb": middle("peak", took, 1),
    }  # fmt: skip


def slope(rows: Sequence[Mapping[str, object]], field: str) -> float | None:
    """Least squares of log(field above its smallest) over log(axis), upper half of the axis."""
    found = sorted((float(str(r["at"])), float(str(r[field]))) for r in rows)
    overhead = min(y for _, y in found)
    upper = [(math.log(x), math.log(y - overhead)) for x, y in found if y > overhead]
    upper = upper[-max(2, len(found) // 2) :]
    if len(upper) < 2:
        return None
    xs, ys = zip(*upper, strict=True)
    return round(statistics.linear_regression(xs, ys).slope, 2)


def exponents(rows: Sequence[Mapping[str, object]]) -> Iterator[dict[str, object]]:
    """Of every operation over every axis with three points or more."""
    groups: dict[tuple[str, str], list[Mapping[str, object]]] = {}
    for one in rows:
        groups.setdefault((str(one["operation"]), str(one["axis"])), []).append(one)
    for (operation, axis), group in groups.items():
        if len(group) < 3:
            continue
        values = [float(str(r["at"])) for r in group]
        found = {f: slope(group, f) for f in ("processor", "peak_mb")}
        name = operation.lower().replace(", ", "-").replace(" ", "-")
        yield {
            "name": f"scaling-exponents/{name}-{axis}", "operation": operation, "axis": axis,
            "from": min(values), "to": max(values), "expected": EXPECTED[operation],
            **{f"{f}_exponent": v for f, v in found.items() if v is not None},
        }  # fmt: skip


def save(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def main() -> None:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--most", type=float, help="points up to this multiple of the first")
    parser.add_argument("--gigabytes", nargs="+", type=float, default=AXES["gigabytes"],
                        help="of the base and the two models together")  # fmt: skip
    parser.add_argument("--llama70b", type=int, nargs="?", const=80, metavar="LAYERS",
                        help="only this: two modules of its shapes, r = 64, bfloat16")  # fmt: skip
    parser.add_argument("--mixtral", type=int, nargs="?", const=32, metavar="LAYERS",
                        help="only this: two modules of its experts, r = 16, bfloat16")  # fmt: skip
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/scaling"))
    parser.add_argument("--folder", help="where inputs are made and removed (default: TMPDIR)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(json.loads(args.measure))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file, rows = args.out / "scaling.jsonl", []
    if file.exists():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    done = {(r["operation"], r["axis"], r["at"]) for r in rows}
    print("| operation | axis | at | read MB | written MB | s | bound s | ratio | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for axis, value, point, operations in points(args):
        wanted = [o for o in operations if (o, axis, value) not in done]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory(prefix="scaling-", dir=args.folder) as temporary:
            folders = [Path(temporary, "small"), Path(temporary, "large")]
            warm = replace(SMALL, gigabytes=point.gigabytes and 0.01)
            for folder, shape in zip(folders, (warm, point), strict=True):
                folder.mkdir()
                make_in_a_process(folder, shape)
            for operation in wanted:
                rows.append(row(axis, value, operation, folders, args.runs, point))
                save(file, rows)
                fields = ("operation", "axis", "at", "read_mb", "written_mb", "seconds", "bound",
                          "ratio", "peak_mb")  # fmt: skip
                print(f"| {' | '.join(str(rows[-1][f]) for f in fields)} |", flush=True)
    found = list(exponents(rows))
    save(args.out / "scaling-exponents.jsonl", found)
    print("\n| operation | axis | from | to | exponent of seconds | of the peak |")
    print("|---|---|---|---|---|---|")
    for one in found:
        fields = ("operation", "axis", "from", "to", "processor_exponent", "peak_mb_exponent")
        print(f"| {' | '.join(str(one.get(f, '-')) for f in fields)} |")


def make_in_a_process(folder: Path, point: Point) -> None:
    """So that this process stays small: what it starts begins at its size."""
    code = f"import pathlib, scaling; scaling.make(pathlib.{folder!r}, scaling.{point!r})"
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


if __name__ == "__main__":
    main()
