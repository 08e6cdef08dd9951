"""The local ``evaluate`` module loads without a network and gives the library's numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import evaluate
folder = {folder!r}
def scores(name, p, y):
    return evaluate.load(folder, name).compute(predictions=p, references=y)
assert scores("mrpc", [0, 1, 1], [0, 1, 0]) == {{"accuracy": 2 / 3, "f1": 2 / 3}}
assert scores("cola", [1, 1, 0, 0], [1, 1, 0, 0]) == {{"matthews_correlation": 1.0}}
assert scores("mnli", [0, 2], [1, 2]) == {{"accuracy": 0.5}}
assert set(scores("stsb", [1.0, 2.0, 4.0], [0.0, 2.5, 3.0])) == {{"pearson", "spearmanr"}}
"""


@pytest.mark.slow  # importing evaluate and datasets takes seconds
def test_evaluate_loads_the_folder_offline(tmp_path, repository):
    pytest.importorskip("evaluate")
    folder = str(repository / "pem_composition/evaluation/glue_metric")
    environment = os.environ | {
        "PYTHONPATH": str(repository), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=folder)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
