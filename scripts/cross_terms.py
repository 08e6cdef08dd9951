"""What a sum of factors adds to the sum of updates, and how much of it is known before a merge.

    python scripts/cross_terms.py --init INIT --modules DIR... --search OUT --output table.csv

A row for each number of modules, two to all of them in the order given, merged at equal weights.

T LoRA modules B_i A_i of one scaling begin at one initial A_0 (and B = 0). Training moved A_0 by
D_i, so an update is B_i A_0 + B_i D_i. At equal weights the paper's sum is
(sum_i B_i / T) (sum_j A_j / T), the exact one sum_i B_i A_i / T. Their difference is

    sum_i B_i (mean_j D_j - D_i) / T:

the paper's sum keeps B_i A_0; of what a module wrote into A it keeps a T-th, and adds T-ths of what
the others wrote there, seen through the wrong B. Let s be the share of A in the updates,
sum_i ||B_i D_i||^2 / sum_i ||B_i A_i||^2, and let a, b and u be the mean cosines over the pairs of
B_i D_i and B_i D_j, of B_i and B_j, of the updates. If ||B_i D_j|| = ||B_i D_i|| and every pair has
the mean cosines, sum_i ||B_i (mean_j D_j - D_i)||^2 is (1 - 1/T) (1 - a) s of the energy of the
updates. A share b of it is common to the B_i and vanishes, for its factors sum to 0. The exact sum
has 1 + (T - 1) u of the mean energy. So the relative error is about

    sqrt((1 - 1/T) s (1 - a) (1 - b) / (1 + (T - 1) u)),

and sqrt((1 - 1/T) s), known of each module alone, where modules have nothing in common.
scripts/cross_terms.sh makes the modules.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from torch import Tensor

import pem_composition as pem
from pem_composition.arithmetic.comparison import compare

Tensors = Mapping[str, Tensor]
SCORES = ("own modules", "best sum in delta space", "best sum in parameter space")


def factors(module: pem.PEM, role: str) -> dict[str, Tensor]:
    """The tensors of a role by layer, in double precision."""
    found = module.adapter_tensors()
    return {n.removesuffix(role): t.double() for n, t in found.items() if n.endswith(role)}


def energy(tensors: Iterable[Tensor]) -> float:
    """The sum of squares."""
    return sum(float(t.square().sum()) for t in tensors)


def cosine(a: Tensors, b: Tensors) -> float:
    """Of two sets of tensors as one vector each; 0 if one of them is 0."""
    size = energy(a.values()) * energy(b.values())
    return sum(float((a[n] * b[n]).sum()) for n in a) / size**0.5 if size else 0.0


def measured(initial: pem.PEM, modules: Sequence[pem.PEM]) -> dict[str, float]:
    """Drift of A, share of A in the updates, agreement of the modules, and the foretold and the
    measured cross terms."""
    first = factors(initial, "lora_A")
    seconds = [factors(m, "lora_B") for m in modules]
    moved = [{n: a - first[n] for n, a in factors(m, "lora_A").items()} for m in modules]
    seen = [[{n: b[n] @ d[n] for n in b} for d in moved] for b in seconds]
    count, compared = range(len(modules)), compare(modules)
    whole = sum(energy(seconds[i][n] @ first[n] + x for n, x in seen[i][i].items()) for i in count)
    share = sum(energy(seen[i][i].values()) for i in count) / whole
    alike_a = fmean(cosine(seen[i][i], seen[i][j]) for i, j in itertools.permutations(count, 2))
    alike_b = fmean(cosine(a, b) for a, b in itertools.combinations(seconds, 2))
    alike = fmean(pair.total.cosine for pair in compared.pairs)
    return {
        "modules": len(modules),
        "drift": fmean((energy(d.values()) / energy(first.values())) ** 0.5 for d in moved),
        "share": share, "alike_a": alike_a, "alike_b": alike_b, "alike": alike,
        "apart": foretold(len(modules), share),
        "foretold": foretold(len(modules), share, alike_a, alike_b, alike),
        "cross_terms": compared.cross_term_error,
    }  # fmt: skip


def foretold(
    modules: int, share: float, alike_a: float = 0.0, alike_b: float = 0.0, alike: float = 0.0
) -> float:
    """The relative error that the share of A and three agreements foretell.

    Examples:
        >>> round(foretold(2, 0.5), 3), foretold(5, 0.0), foretold(3, 0.4, alike_a=1.0)
        (0.5, 0.0, 0.0)
    """
    apart = (1 - 1 / modules) * share * (1 - alike_a) * (1 - alike_b)
    return (apart / (1 + (modules - 1) * alike)) ** 0.5


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
        writer.writerows({"row": f"{row['modules']} modules", **row} for row in found)
    print(given.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
