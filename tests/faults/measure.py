"""What the installed PEFT does with the input of this catalogue; ``scripts/bad_input.py --peers``.

Every case is a fork with a time and a memory limit. A module counts as read rightly if the logits
are those of the undamaged one; a sum if the update is sum_i c_i dW_i.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults import oracle, world
from faults.case import READERS, Case
from faults.catalogue import CASES
from support.tiny_models import inputs_for

import pem_composition as library

SECONDS, MEMORY = 40, 6 * 1024**3
RIGHT = "right result"
TARGET = Path(__file__).with_name("peers.json")
Model = Any


def write() -> None:
    """Measure every case that can be put to PEFT, and record what happened."""
    import peft
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before, found = Path.cwd(), {}
    with tempfile.TemporaryDirectory() as folder:
        root = world.build(Path(folder) / "world")
        for name in ("good", "bad", "wide", "rs", "late", "ia3", "ia3b"):
            headless(root, name)
        for case in CASES:
            run = SUMS.get(case.id) or (reading(case) if reads(case) else None)
            if run:
                shutil.copytree(root, Path(folder) / "here")
                os.chdir(Path(folder) / "here")
                if case.damage:
                    case.damage(Path.cwd())
                found[case.id] = forked(run)
                os.chdir(before)
                shutil.rmtree(Path(folder) / "here")
    text = {"peft": peft.__version__, "transformers": transformers.__version__, "cases": found}
    TARGET.write_text(json.dumps(text, indent=1) + "\n")


def reads(case: Case) -> bool:
    """True where a damaged bad is read; not where the file pretends to be a terabyte."""
    if case.damage is None or not isinstance(case.run, tuple) or case.id == "N38":
        return False
    return case.run[0][0] == "merge" and {"bad"} <= set(case.run[0]) <= {*READERS[0], *READERS[1]}


def headless(root: Path, name: str) -> None:
    """The module without its head, as PEFT can combine it, under ``plain-NAME``."""
    module = library.load(root / name)
    library.combine([module], [1.0], head="none").save(root / f"plain-{name}")


def forked(run: Callable[[], str]) -> str:
    """The outcome of a function in a process of its own."""
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        Path("outcome").write_text(told(run))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return f"not done after {SECONDS} s"
    text = Path("outcome").read_text() if not code else f"ended with {code}"
    return "the payload ran" if Path("executed").exists() else text


def told(run: Callable[[], str]) -> str:
    """What was raised, warned of or computed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome = run()
        except BaseException as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
    said = [str(w.message) for w in caught if w.category is UserWarning]
    if not said:
        return outcome if outcome == RIGHT else f"silent, {outcome}"
    return f"warning: {' '.join(said[0].split())[:60]}...; {outcome}"


# --- modules ---


def reading(case: Case) -> Callable[[], str]:
    """Load bad with PEFT and compare the logits with those of the undamaged module."""

    def run() -> str:
        exact = logits("good") if case.id == "M11" else logits("ours")
        return compared(logits("bad"), exact)

    return run


def logits(module: str) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(classifier(), module).eval()
    with torch.no_grad():
        return model(**inputs_for(model)).logits


def classifier() -> Model:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained("base").eval()


def compared(found: torch.Tensor, exact: torch.Tensor) -> str:
    if not found.isfinite().all():
        return "NaN logits"
    distance = float((found - exact).abs().max())
    return RIGHT if distance < 1e-5 else f"logits off by {distance:.2g}"


# --- sums ---


def combined(
    terms: dict[str, Any], exact: dict[str, float] | None = None, **options: Any
) -> Callable[[], str]:
    """add_weighted_adapter, saved, and its relative distance from the exact sum."""

    def run() -> str:
        from peft import PeftModel

        names = list(options.pop("adapters", terms))
        model = classifier()
        weights = options.pop("weights", list(terms.values()))
        for i, name in enumerate(dict.fromkeys(names)):
            if i:
                model.load_adapter(f"plain-{name}", adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, f"plain-{name}", adapter_name=name)
        out = options.pop("out", "sum")
        model.add_weighted_adapter(names, weights, out, **options)
        model.save_pretrained("saved", selected_adapters=[out])
        found = oracle.updates(Path("saved") / out)
        goal = oracle.weighted(
            *((c, oracle.updates(Path(f"plain-{n}"))) for n, c in (exact or terms).items())
        )
        distance = oracle.distance(found, goal)
        if distance != distance:
            return "NaN"
        return RIGHT if distance < 1e-5 else f"relative distance {distance:.2g}"

    return run


HALF = {"good": 0.5, "bad": 0.5}
LINEAR = {"combination_type": "linear"}
SUMS: dict[str, Callable[[], str]] = {
    "M03": combined({"good": -0.5}, **LINEAR),
    "M20b": combined({"good": 1.0}, combination_type="linaer"),
    "M04": combined({}, adapters=["good"], weights=[], **LINEAR),
    "M05": combined(HALF, weights=[0.5], **LINEAR),
    "M05b": combined(HALF, weights=[0.5, 0.5, 0.5], **LINEAR),
    "M05c": combined(HALF, weights=[0.5], combination_type="cat"),
    "M06": combined({"good": 1.0}, adapters=["good", "good"], weights=[0.5, 0.5], **LINEAR),
    "M08": combined(HALF, out="bad", **LINEAR),
    "M09": combined({"good": 0.5, "wide": 0.5}, **LINEAR),
    "M09b": combined({"good": 0.5, "wide": 0.5}, combination_type="svd"),
    "M12": combined({"good": 0.5, "ia3": 0.5}, **LINEAR),
    "M13b": combined({"ia3": 1.0, "ia3b": 1.0}),
    "M13c": combined({"ia3": -1.0}),
    "M13d": combined({"ia3": 0.5, "ia3b": 0.5}, weights=[1.0]),
    "M16": combined({"rs": 1.0}, combination_type="svd"),
    "M16b": combined({"rs": 1.0}, **LINEAR),
    "M16c": combined({"rs": 1.0, "good": -1.0}, combination_type="cat"),
    "M18": combined({"good": float("nan"), "bad": 1.0}, exact=HALF, **LINEAR),
    "M18b": combined({"good": float("inf"), "bad": 1.0}, exact=HALF, combination_type="svd"),
    "M18c": combined({"good": 1.0, "bad": float("-inf")}, exact=HALF, combination_type="cat"),
    "M19": combined(HALF, weights=["0.5", "0.5"], **LINEAR),
    "M20": combined(HALF, combination_type="linaer"),
    "M20c": combined(HALF, combination_type="foosvd"),
    "M22": combined(HALF, combination_type="svd", svd_rank=0),
    "M22b": combined(HALF, combination_type="svd", svd_rank=1000),
    "M22c": combined(HALF, combination_type="svd", svd_rank=2),
    "M26": combined({"good": 0.5, "late": 0.5}, **LINEAR),
    "M26b": combined({"late": 1.0}, **LINEAR),
    "M26c": combined({"good": 0.5, "late": 0.5}, combination_type="cat"),
}
