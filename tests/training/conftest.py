"""One tiny base model and data set for all training tests."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    from support.training_bench import Bench

    return Bench(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def reference(bench):
    """The uninterrupted run that killed, stopped and resumed ones must equal bit for bit."""
    child = bench.start("reference")
    assert child.wait() == 0, child.text()
    return bench.folder / "reference"


@pytest.fixture(scope="session")
def causal(bench):
    from support.objective_benches import CausalBench

    return CausalBench(bench)


@pytest.fixture(scope="session")
def text(bench):
    from support.objective_benches import Seq2SeqBench

    return Seq2SeqBench(bench)
