"""``pem exps``: the experiment scripts of an installed package, copied to where they are run."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from pem_composition.errors import EXIT_DONE
from pem_composition.flag_declarations import flag, required
from pem_composition.safe_files import atomic_directory

NAME = "exps"
HELP = "copy the experiment scripts into a folder, to be edited and run there"
EXAMPLES = """
  pem exps .
  pem exps experiments
"""
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem exps."""

    output_dir: str = required(
        "the folder that gets the folder exps", positional=True, metavar="DIR"
    )
    overwrite: bool = flag(False, "replace the scripts that are there", short="-o")


def run(config: Config) -> int:
    """Copy the scripts; they appear together or not at all."""
    target = Path(config.output_dir) / "exps"
    with atomic_directory(target, config.overwrite) as temporary:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(scripts(), temporary, ignore=ignored, dirs_exist_ok=True)
    print(f"{target}: edit the block at the top of a script, then run it from {config.output_dir}:")
    print(f"  PYTHON={sys.executable} bash exps/composition_for_multitasking/run_all.sh")
    return EXIT_DONE


def scripts() -> Path:
    """Inside the package where it was installed (setup.py), else beside it as in the repository."""
    inside = PACKAGE / "exps"
    return inside if inside.is_dir() else PACKAGE.parent / "exps"
