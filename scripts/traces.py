"""Record what the commands of the README do on tiny models, to compare before and after a change.

python scripts/traces.py record FILE     # exit code, output and sha256 of every written file
python scripts/traces.py compare FILE    # run again; name what differs; exit 1 if anything does

Bits depend on the processor and on the libraries: record and compare on one machine. Times,
absolute paths and digests in texts are left out.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "MPLBACKEND": "agg"}

TASK = "--model_name_or_path cls/base --task_name mnli"
ROWS = "--validation_file cls/dev.jsonl --test_file cls/test.jsonl"
TRAIN = "--model_name_or_path bert --task_name sst2 --train_file train.jsonl"
SHORT = (
    "--validation_file dev.jsonl --max_steps 4 --learning_rate 1e-2 --max_seq_length 32 "
    "--logging_steps 2 --disable_tqdm true"
)
PAIR = "-a cls/half1 cls/half2"
LM = "--model_name_or_path lm/base"
T5 = "--model_name_or_path text/base --objective seq2seq"
NEGATE = (
    f"-a lm/module --evaluate {LM} --prompt_file lm/prompts.jsonl --num_samples 4 "
    "--max_new_tokens 8 --top_k 40 --seed 3 --judge lm/judge --threshold 0.5 "
    "--perplexity_file lm/text.raw --window 16 --stride 8"
)
# name -> the words after `pem`; later ones read what earlier ones wrote
COMMANDS = {
    "help": "--help",
    "methods": "methods",
    "merge": f"merge {PAIR} -p merged --coefficients 0.3 0.7",
    "merge, search step": f"merge {PAIR} -p stepped --search_step 30 70 --head first",
    "merge, delta": f"merge {PAIR} -p exact --coefficients 1 -0.4 --space delta",
    "merge, rank": f"merge {PAIR} -p ranked --space delta --rank 3 --dtype float16",
    "merge, log": "merge -a ia3/1 ia3/2 -p product --coefficients 0.5 0.5 --space log",
    "merge, ties": "merge -a cls/half1 cls/half2 cls/half3 -p ties -w ties --setting density=0.2",
    "merge, (IA)^3": "merge -a ia3/1 ia3/2 -p scaled --coefficients 0.3 0.7",
    "merge, reference layout": f"merge {PAIR} -p reference --format adapter-transformers",
    "merge, whole models": "merge -a full/1 full/2 -p whole --full_merge -m cls/base",
    "negation": "negation -a cls/half1 -p negated --strength 0.6",
    "analogy": "analogy -a cls/half1 cls/half2 cls/half3 -p analogy --coefficient 0.9",
    "compose": 'compose "0.6*a + 0.4*(b - c)" --module a=cls/half1 --module b=cls/half2 '
    "--module c=cls/half3 -p composed",
    "compose, methods": 'compose "0.5*ties(a, 0.5*b, density=0.2) + c" --module a=cls/half1 '
    "--module b=cls/half2 --module c=cls/half3 -p nested",
    "fold": 'fold "a + 0.5*f" --module a=cls/half1 --module f=full/1 --model cls/base -p folded',
    "extract": "extract cls/base full/1 -p extracted --rank 4",
    "detoxify": "detoxify -a cls/half1 cls/half2 -p clean --strength 0.5",
    "inspect": "inspect merged --values",
    "check": "check cls/half1 cls/half2 ia3/1",
    "compare": f"compare {PAIR} -p compared".replace("-a ", ""),
    "rebuild": "rebuild merged",
    "convert": "convert cls/half1 converted --format adapter-transformers",
    "refusal": "merge -a cls/half1 ia3/1 -p refused",
    "unknown flag": f"merge {PAIR} -p refused --coeficients 1 1",
    "split": "split --task_name sst2 --train_file train.jsonl "
    "--key_class 0 --validation_size 20 --output_dir split",
    "init": "init --model_name_or_path bert --task_name sst2 --adapter_config lora --lora_r 4 "
    "--output_dir init",
    "train": f"train {TRAIN} {SHORT} --adapter_config lora --lora_r 4 --init_from init "
    "--output_dir trained",
    "train, (IA)^3": f"train {TRAIN} {SHORT} --adapter_config ia3 --output_dir trained-ia3",
    "train, again": f"train {TRAIN} {SHORT} --adapter_config lora --lora_r 4 --init_from init "
    "--output_dir trained",
    "evaluate": "evaluate --model_name_or_path bert --adapter trained --task_name sst2 "
    "--validation_file dev.jsonl --output_dir evaluated",
    "sweep": f"merge {PAIR} -p sweep --grid 0 0.5 1 --evaluate {TASK} {ROWS}",
    "sweep, again": f"merge {PAIR} -p sweep --grid 0 0.5 1 --evaluate {TASK} {ROWS}",
    "fisher": f"fisher {TASK} --adapter cls/half1 --validation_file cls/dev.jsonl "
    "--split validation --output_dir fisher1",
    "fisher, second": f"fisher {TASK} --adapter cls/half2 --validation_file cls/dev.jsonl "
    "--split validation --output_dir fisher2",
    "merge, fisher": f"merge {PAIR} -p weighted -w fisher -f fisher1 fisher2",
    "gram": f"gram {TASK} --adapter cls/half1 --validation_file cls/dev.jsonl --split validation "
    "--output_dir gram1",
    "search": f"search {PAIR} -p search {TASK} {ROWS} --methods ties --coefficients shared "
    "--sampler grid --grid 1 1 2 --search density=0.2:0.4:0.2",
    "learn": f"learn {PAIR} -p learned {TASK} {ROWS} --method adamerging --max_steps 3",
    "train, text to text": f"train {T5} --task_name rte --train_file text/rte-d.jsonl "
    "--validation_file text/rte-t.jsonl --max_steps 2 --disable_tqdm true --output_dir t5",
    "evaluate, text to text": f"evaluate {T5} --adapter text/m1 --task_name rte "
    "--validation_file text/rte-d.jsonl --answers free --output_dir answers",
    "sweep, two tasks": f"merge -a text/m1 text/m2 -p both --grid 0 0.5 1 --evaluate {T5} "
    "--task_name rte sst2 --validation_file text/rte-d.jsonl text/sst2-d.jsonl "
    "--test_file text/rte-t.jsonl text/sst2-t.jsonl",
    "unlearning": f"negation {NEGATE} -p unlearned --grid 0.5 0.5 1",
    "generate": f"generate {LM} --adapter lm/module --prompt_file lm/prompts.jsonl "
    "--num_samples 2 --max_new_tokens 8 --output_file texts.jsonl",
    "perplexity": f"perplexity {LM} --adapter lm/module --text_file lm/text.raw --window 16 "
    "--stride 8",
    "judge": "judge score --texts texts.jsonl --judge lm/judge",
    "report": "report -r sweep -p table",
}  # fmt: skip


def fixtures() -> None:
    """Write models, modules and rows into the working directory."""
    import torch
    from support import sweep_data, training_bench, unlearning_data
    from support.tiny_models import moved, random_module, tiny

    from pem_composition.evaluation.models import save_model

    torch.set_num_threads(1)
    here = Path()
    sweep_data.make(here / "cls")
    sweep_data.make_text(here / "text")
    unlearning_data.make(here / "lm")
    training_bench.make_base(here / "bert")
    training_bench.write_rows(here / "train.jsonl", 64, seed=1)
    training_bench.write_rows(here / "dev.jsonl", 24, seed=2)
    for seed in (1, 2):
        module = random_module(tiny("roberta"), "ia3", seed=seed, head_seed=seed)
        positive = {
            n: t.abs() + 0.1 if n.endswith(".ia3") else t for n, t in module.tensors.items()
        }
        replace(module, tensors=positive).save(here / "ia3" / str(seed))
        save_model(moved(tiny("roberta"), seed), here / "full" / str(seed))
        sweep_data.write_tokenizer(here / "full" / str(seed))


def run(words: list[str], log: Path) -> int:
    """``pem`` in a child process that has torch imported already; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(os.open(f"{log}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        from pem_composition.cli import main

        code = main(words)
        sys.stdout.flush()
    finally:
        os._exit(code)


# Numbers that a second run changes, in texts and as keys of JSON.
TIMES = re.compile(
    r"\d+(\.\d+)? ?(s|min|h|ms|MB|GB|kB|rows/s|tokens/s|steps/s|per second)\b"
    r"|((?<=runtime)|(?<=_second))\W+\d+(\.\d+)?"
    r"|\b\d+\.\d\d(?= \|$|</td></tr>)",  # a last column of seconds
    re.MULTILINE,
)
TIMED = re.compile(r"second|runtime|time|date|elapsed|memory|flos|per_s|host|pid|written_at")
DIGEST = re.compile(r"\b[0-9a-f]{12,64}\b")


def plain(text: str) -> str:
    """The text without what belongs to one run: times, its directory, digests."""
    text = text.replace(str(Path.cwd()), "HERE").replace(str(ROOT), "ROOT")
    return DIGEST.sub("HEX", TIMES.sub("TIME", text))


def timeless(value: Any) -> Any:
    """JSON without entries of time, and with plain texts."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not TIMED.search(k)}
    if isinstance(value, list):
        return [timeless(v) for v in value]
    return plain(value) if isinstance(value, str) else value


def content(path: Path) -> str:
    """sha256 of a file; of a text without what belongs to one run."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = [data] if path.suffix == ".json" else data.splitlines()
        data = json.dumps([timeless(json.loads(line)) for line in lines], sort_keys=True).encode()
    elif path.suffix == ".csv":
        rows = csv.DictReader(data.decode().splitlines())
        data = json.dumps([timeless(row) for row in rows]).encode()
    elif path.suffix in (".md", ".txt", ".tex", ".svg", ".yaml", ".html"):
        data = plain(data.decode()).encode()
    return hashlib.sha256(data).hexdigest()


def written(before: set[Path]) -> dict[str, str]:
    """New files and their content; a database holds times and is named only."""
    found: dict[str, str] = {}
    for path in sorted(set(Path().rglob("*")) - before):
        if path.is_file():
            digest = "" if path.suffix in (".db", ".sqlite3") else content(path)
            name = plain(str(path))  # names that hold a digest share one entry
            found[name] = " ".join(sorted([*found.get(name, "").split(), digest]))
    return found


def traces() -> dict[str, Any]:
    """Every command's exit code, output and new files, in a directory of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        fixtures()
        for name, words in COMMANDS.items():
            before = set(Path().rglob("*"))
            log = Path("output.log")
            code = run(shlex.split(words), log)
            output = plain(log.read_text(encoding="utf-8")).splitlines()
            errors = log.with_name("output.log.err")
            if code:  # otherwise there are warnings and bars of progress
                output += plain(errors.read_text(encoding="utf-8")).splitlines()[-1:]
            log.unlink()
            errors.unlink()
            found[name] = {"exit": code, "output": output, "files": written(before)}
            print(f"{name}: exit {code}, {len(found[name]['files'])} files", flush=True)
        os.chdir(ROOT)
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """One line for everything that is not as it was."""
    for name in [*old, *(n for n in new if n not in old)]:
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            yield f"{name}: {'new' if a is None else 'gone'}"
            continue
        if a["exit"] != b["exit"]:
            yield f"{name}: exit {a['exit']} is now {b['exit']}"
        for sign, lines, others in (("-", a, b), ("+", b, a)):
            for line in lines["output"]:
                if line not in others["output"]:
                    yield f"{name}: {sign} {line}"
        for file in sorted(a["files"].keys() | b["files"].keys()):
            if a["files"].get(file) != b["files"].get(file):
                yield f"{name}: {file} differs"


def main() -> int:
    """Record, or compare with what was recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    file = given.file.resolve()
    old = json.loads(file.read_text(encoding="utf-8")) if given.action == "compare" else {}
    new = traces()
    if given.action == "record":
        file.write_text(json.dumps(new, indent=1), encoding="utf-8")
        return 0
    found = list(differences(old, new))
    print(*found, f"{len(found)} differences in {len(new)} commands", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may see enough
    sys.exit(main())
