"""A build backend that builds nothing and reads nothing of the package.

pip asks the backend of a source distribution for its name and version before it keeps the file.
``fetch.py`` puts a copy of this module where pip looks for the real backend, so that the answer
comes from here and no line of the package runs. The copy runs outside of pem_composition, so it
imports the standard library only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

REQUIREMENT = "PEM_OFFLINE_REQUIREMENT"
__legacy__ = sys.modules[__name__]  # the object pip calls for packages without pyproject.toml


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: object = None
) -> str:
    """PEP 517: write the metadata (name and version, as asked for) and return its folder's name."""
    name, _, version = os.environ[REQUIREMENT].partition("==")
    folder = Path(metadata_directory, f"{name.replace('-', '_')}-{version}.dist-info")
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")
    return folder.name
