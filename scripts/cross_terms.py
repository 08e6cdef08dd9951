"""What a sum of factors adds to the sum of updates, and how much of it is known before a merge.

    python scripts/cross_terms.py --init INIT --modules DIR... --search OUT --output table.csv

A row for each number of modules, two to all of them in the order given, merged at equal weights.

T LoRA modules B_i A_i of one scaling begin at one initial A_0 (and B = 0). Training moved A_0 by
D_i, so an update is B_i A_0 + B_i D_i. At equal weights the paper's sum is
(sum_i B_i / T) (sum_j A_j / T), the exact one sum_i B_i A_i / T. Their difference is

    sum_i B_i (mean_j D_j - D_i) / T:

the paper's sum keeps B_i A_0; of what a module wrote into A it keeps a T-th, and adds T-ths of what
the others wrote there, seen through the wrong B. Let s be the share of A in the updates,
sum_i ||B_i D_i||^2 / sum_i ||B_i A_i||^2. Where updates of different modules are orthogonal and a
foreign B_i D_j weighs between nothing and as much as an own one, the relative error is between

    (1 - 1/T) sqrt(s)  and  sqrt(1 - 1/T) sqrt(s),

and s is known of each module before anything is merged. scripts/cross_terms.sh makes the modules.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from torch import Tensor

import pem_composition as pem
from pem_composition.arithmetic.comparison import compare

SCORES = ("own modules", "best sum in delta space", "best sum in parameter space")


def factors(module: pem.PEM, role: str) -> dict[str, Tensor]:
    """The tensors of a role by layer, in double precision."""
    found = module.adapter_tensors()
    return {n.removesuffix(role): t.double() for n, t in found.items() if n.endswith(role)}


def energy(tensors: Iterable[Tensor]) -> float:
    """The sum of squares."""
    return sum(float(t.square().sum()) for t in tensors)


def measured(initial: pem.PEM, modules: Sequence[pem.PEM]) -> dict[str, float]:
    """Drift of A, share of A in the updates, the mean cosine of B_i D_i and B_i D_j, and the
    foretold and the measured cross terms."""
    first = factors(initial, "lora_A")
    seconds = [factors(m, "lora_B") for m in modules]
    moved = [{n: a - first[n] for n, a in factors(m, "lora_A").items()} for m in modules]
    drift = fmean((energy(d.values()) / energy(first.values())) ** 0.5 for d in moved)
    pairs = list(zip(seconds, moved, strict=True))
    whole = sum(energy(b[n] @ (first[n] + d[n]) for n in b) for b, d in pairs)
    own, alike = 0.0, []
    for i, b in enumerate(seconds):
        seen = [{n: b[n] @ d[n] for n in b} for d in moved]
        sizes = [energy(x.values()) for x in seen]
        own += sizes[i]
        alike += [
            sum(float((seen[i][n] * x[n]).sum()) for n in b) / (sizes[i] * size) ** 0.5
            for j, (x, size) in enumerate(zip(seen, sizes, strict=True))
            if j != i and size and sizes[i]
        ]
    low, high = foretold(len(modules), own / whole)
    return {
        "modules": len(modules), "drift": drift, "share": own / whole,
        "alike": fmean(alike) if alike else 0.0, "low": low, "high": high,
        "cross_terms": compare(modules).cross_term_error,
    }  # fmt: skip


def foretold(modules: int, share: float) -> tuple[float, float]:
    """The least and the largest relative error that the share of A foretells.

    Examples:
        >>> foretold(2, 1.0)
        (0.5, 0.7071067811865476)
        >>> foretold(5, 0.0)
        (0.0, 0.0)
    """
    rest = 1 - 1 / modules
    return rest * share**0.5, (rest * share) ** 0.5


def scores(search: Path) -> dict[str, float]:
    """Means over the tasks from the table of a search with controls."""
    with (search / "table.csv").open(encoding="utf-8", newline="") as lines:
        rows = {line["row"]: line for line in csv.DictReader(lines) if line["task"] == "mean"}
    own, exact, paper = (rows[name] for name in SCORES)
    worse = paper if paper["difference"] else exact  # differences are to the better of the two
    return {
        "own": float(own["score"]), "exact": float(exact["score"]),
        "paper_minus": float(paper["score"]) - float(exact["score"]),
        "paper_minus_se": float(worse["difference_standard_error"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init", required=True)
    parser.add_argument("--modules", nargs="+", required=True)
    parser.add_argument("--search", type=Path, help="of all of them, with --controls")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    initial, modules = pem.load(given.init), [pem.load(m) for m in given.modules]
    found = [measured(initial, modules[:count]) for count in range(2, len(modules) + 1)]
    if given.search is not None:
        found[-1] |= scores(given.search)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["row", *found[-1]])
        writer.writeheader()
        writer.writerows({"row": f"{int(row['modules'])} modules", **row} for row in found)
    print(given.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
