"""Hostile pickles, code of base models, and weights that are not there."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import torch
from faults import damage as d
from faults.case import READERS, Case
from faults.cases_files import RESTORE, SMALL
from faults.oracle import close, updates
from faults.world import BIN, CONFIG, WEIGHTS
from safetensors.torch import load_file

PICKLE = f"bad/{BIN}"
AWAY = "load it where you trust it and save it again as safetensors"
GLOBAL = "refused: the pickle names a global that a file of tensors does not need"


def evil_model(folder: Path) -> None:
    """A base model whose weights run a command when they are unpickled."""
    (folder / "base" / "model.safetensors").unlink()
    d.write_bin(folder / "base" / "pytorch_model.bin", d.ATTACK)


def evil_code(folder: Path) -> None:
    """A base model whose config asks for its own code to be run."""
    path = folder / "base" / "config.json"
    raw = json.loads(path.read_text()) | {"model_type": "evil"}
    classes = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
    raw["auto_map"] = {name: f"evil.{name}" for name in classes}
    path.write_text(json.dumps(raw))
    (folder / "base" / "evil.py").write_text("import pathlib; pathlib.Path('executed').touch()\n")


def load_model(name: str, **options: object) -> object:
    """A base model as the programs that evaluate load it."""
    from pem_composition.evaluation.models import load_base

    return load_base(name, num_labels=3, **options)


def bomb(folder: Path) -> None:
    """9 MB that unpack to more than the memory of many machines."""
    with zipfile.ZipFile(folder / BIN, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(256):
                entry.write(bytes(1 << 20))


def two_files(folder: Path) -> None:
    held = {n: t + 1 for n, t in load_file(folder / "bad" / WEIGHTS).items()}
    torch.save(held, folder / "bad" / BIN)


def cut_bin(bad: Path) -> None:
    torch.save({"a": torch.ones(100)}, bad / BIN)
    os.truncate(bad / BIN, (bad / BIN).stat().st_size // 2)


CASES = (
    Case(
        "T01", "malicious adapter_model.bin",
        f"{PICKLE}: {GLOBAL}; found posix.system, expected tensors only; {AWAY}",
        d.pickled(d.ATTACK),
    ),
    Case(
        "T02", "malicious pytorch_model.bin of the base model",
        f"base/pytorch_model.bin: {GLOBAL}; found posix.system, expected tensors only; {AWAY}",
        evil_model,
        run=(
            ("merge", "-a", "good", "-p", "out", "-m", "base"),
            ("negation", "-a", "m1", "-p", "out", "-m", "base"),
            ("merge", "-a", "base", "m1", "-p", "out", "--full_merge"),
        ),
    ),
    Case(
        "T04", "zip bomb",
        f"{PICKLE}: zip entry 'archive/data.pkl'; found compressed or encrypted, expected stored "
        f"as torch.save does; {AWAY}",
        d.instead(bomb), run=READERS[:3], memory=SMALL,
    ),
    Case(
        "T05", "adapter_model.bin cut short",
        f"{PICKLE}: damaged zip file (no end record); {RESTORE}",
        d.instead(cut_bin),
    ),
    Case(
        "T06", "two weights files that differ, .safetensors and .bin",
        f"out = +1*bad  (...)\nnote: bad: {WEIGHTS} was read, {BIN} beside it was not",
        two_files, run=(("merge", "-a", "bad", "-p", "out"),), code=0,
        check=lambda here: close(updates(here / "out"), updates(here / "bad")),
    ),
    Case(
        "T08", "base model with code of its own (auto_map)",
        "base: cannot be loaded (ValueError: The repository base contains custom code which must "
        "be executed to correctly load the model. ...); check that the files are complete and "
        "belong together",
        evil_code, run=lambda here: load_model("base"),
    ),
    Case(
        "T09", "module whose base model has code of its own",
        "out = +1*bad  (space parameter, head average, error against sum c_i dW_i: 0)",
        d.both(evil_code, d.config(auto_mapping={"parent_library": "evil",
                                                 "base_model_class": "Evil"})),
        run=(("merge", "-a", "bad", "-p", "out"),), code=0,
        check=lambda here: close(updates(here / "out"), updates(here / "bad")),
    ),
    Case(
        "T11", "adapter_model.bin holds a list",
        f"{PICKLE}: wrong content; found a list, expected a dict of tensors; {AWAY}",
        d.instead(lambda bad: torch.save([1, 2], bad / BIN)),
    ),
    Case(
        "T12", "no weights file",
        f"bad: no weights; found {CONFIG}, expected {WEIGHTS} (or {BIN}); copy the weights beside "
        f"{CONFIG}",
        d.instead(lambda bad: None),
    ),
    Case(
        "T13", "no such directory",
        "bad: no such directory; expected a directory with a module; check the path",
        lambda here: (here / "bad").rename(here / "moved"),
    ),
)  # fmt: skip
