"""The result files of a run."""

from __future__ import annotations

import json

from pem_composition.training import results


def test_what_other_splits_have_stays_in_all_results(tmp_path):
    results.write_results(tmp_path, {"train": {"train_loss": 0.5}, "eval": {"eval_accuracy": 0.7}})
    results.write_results(tmp_path, {"eval": {"eval_accuracy": 0.8}})
    found = json.loads((tmp_path / "all_results.json").read_text())
    assert found == {"train_loss": 0.5, "eval_accuracy": 0.8}
    (tmp_path / "all_results.json").write_text("{torn")
    results.write_results(tmp_path, {"test": {"test_accuracy": 0.1}})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"test_accuracy": 0.1}
