"""The reference's program of this name: perplexity on WikiText-2's test part, 1,024 tokens by 512.

    python compute_ppl.py --load_adapter runs/negated/civil_comments

There the module stood in the code; here it is a flag. It calls ``pem perplexity``, to which other
flags go on as they are.
"""

from __future__ import annotations

import argparse
import sys

import former


def main(argv: list[str] | None = None) -> int:
    """Exit code of ``pem perplexity``."""
    parser = argparse.ArgumentParser("compute_ppl.py", allow_abbrev=False)
    parser.add_argument("--model_name_or_path", default=former.MODEL, help="the base model")
    parser.add_argument("--load_adapter", help="module; without it the base model alone")
    parser.add_argument("--text_file", default="wikitext2", help="the text (default: wikitext2)")
    given, rest = parser.parse_known_args(argv)
    words = ["--model_name_or_path", given.model_name_or_path, "--text_file", given.text_file]
    words += ["--adapter", given.load_adapter] if given.load_adapter else []
    return former.run("perplexity", *words, "--window", 1024, "--stride", 512, *rest)


if __name__ == "__main__":
    sys.exit(main())
