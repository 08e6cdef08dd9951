"""A package index that is a folder, and a cache of the test's own."""

from __future__ import annotations

import pytest

from pem_composition.offline import cache


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An empty cache, and pip that finds packages in the returned folder only."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("PEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    cache.verify.cache_clear()
    return folder
