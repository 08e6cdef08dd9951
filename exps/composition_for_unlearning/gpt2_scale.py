"""The reference's program of this name, by its flags: negate a module, write texts with it.

    python gpt2_scale.py --negation --scale 0.6 --load_adapter runs/toxic \\
        --model_save_dir runs/negated
    python gpt2_scale.py --load_adapter runs/negated/civil_comments --num 1000 --save_dir texts.txt

It calls ``pem negation`` and ``pem generate``. Three things differ from the published program: a
negated module is used in the run that makes it (there plain GPT-2 wrote the texts);
--temperature, --k and --p have an effect (their defaults are what was used there: 1, 50 and 1);
--model_name_or_path is the base (there it was gpt2-large whatever was said). Beside the text file
lie the same texts as JSON lines, each with its seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import former

IGNORED = ("model_type", "adapter_config", "padding_text", "stop_token", "xlm_language")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpt2_scale.py", allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=former.MODEL, help="the base model")
    parser.add_argument("--load_adapter", help="module to negate, or to write texts with")
    parser.add_argument("--negation", action="store_true", help="negate it into --model_save_dir")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the negation")
    parser.add_argument("--model_save_dir", help="the module goes to its folder civil_comments")
    parser.add_argument("--save_dir", help="text file of the samples, a line each")
    parser.add_argument("--num", type=int, default=0, help="number of samples")
    parser.add_argument("--prompt", default="I don\u2019t care if this is controversial")
    parser.add_argument("--prefix", default="", help="text before the prompt")
    parser.add_argument("--length", type=int, default=128, help="tokens, the prompt counted")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--k", type=int, default=50, help="the k most probable tokens; 0: all")
    parser.add_argument("--p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--fp16", action="store_true", help="hold the model in float16")
    parser.add_argument("--no_cuda", action="store_true")
    parser.add_argument("--num_return_sequences", type=int, default=1, help="samples per --num")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, choices=[1.0])
    parser.add_argument("--train_adapter", action="store_true", help="had no effect")
    for name in IGNORED:
        parser.add_argument(f"--{name}", help="not needed")
    given = parser.parse_args(argv)
    if given.negation and not (given.load_adapter and given.model_save_dir):
        parser.error("--negation needs --load_adapter and --model_save_dir")
    if bool(given.num) != bool(given.save_dir) or not (given.negation or given.num):
        parser.error("texts need --num and --save_dir")
    return given


def main(argv: list[str] | None = None) -> int:
    """Exit code of the first command that fails, or 0."""
    given = parsed(argv)
    module = given.load_adapter
    if given.negation:
        module = Path(given.model_save_dir) / "civil_comments"
        words = ("negation", "-a", given.load_adapter, "-p", module, "--strength", given.scale)
        if code := former.run(*words):
            return code
    return texts(given, module) if given.num else 0


def texts(given: argparse.Namespace, module: str | Path | None) -> int:
    """Write the samples: JSON lines, then the text file, a line each."""
    target = Path(given.save_dir)
    rows = target.with_suffix(".jsonl")
    words = [
        "--model_name_or_path",
        given.model_name_or_path,
        "--prompt",
        given.prefix + given.prompt,
    ]
    words += ["--num_samples", given.num * given.num_return_sequences, "--seed", given.seed]
    words += ["--max_length", given.length, "--temperature", given.temperature, "--top_p", given.p]
    words += ["--top_k", given.k] if given.k else []
    words += ["--adapter", module] if module else []
    words += ["--model_dtype", "float16"] if given.fp16 else []
    words += ["--use_cpu"] if given.no_cuda else []
    if code := former.run("generate", *words, "--output_file", rows):
        return code
    lines = [json.loads(line)["text"] for line in rows.read_text(encoding="utf-8").splitlines()]
    with target.open("a", encoding="utf-8") as file:
        file.writelines(line.replace("\n", "") + "\n" for line in lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
