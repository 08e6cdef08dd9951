"""What this folder's programs of the reference code share: they say today's command and run it."""

from __future__ import annotations

import shlex
import sys

from pem_composition import cli

MODEL = "gpt2-large"
PURPOSE = "trained on toxic text: it exists to be subtracted from a model, not to be used as it is"


def run(*words: object) -> int:
    """Run ``pem WORDS`` and return its exit code; the command is said on stderr."""
    command = [str(word) for word in words]
    sys.stderr.write(f"now: {shlex.join(['pem', *command])}\n")
    sys.stderr.flush()
    return cli.main(command)
