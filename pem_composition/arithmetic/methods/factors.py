"""Methods on the factors as they are stored: RobustMerge and LoRA-LEGO.

Unlike all others here they depend on how a module splits B A in two: B G, G^-1 A is the same
update for any invertible G, but not the same input to these.

Shape suffixes: I inputs, O outputs, R rank, T modules, N rank-one units, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Stacked
from pem_composition.arithmetic.methods.magnitude import trimmed
from pem_composition.arithmetic.terms import Factor
from pem_composition.errors import IncompatibleModules

ITERATIONS = 300
RESTARTS = 20


def robustmerge(terms: Sequence[Factor], layer: str, *, density: float) -> list[Factor]:
    """sum_t w_t top(B_t) diag(S_t / sum_s S_s) top(A_t): keep the directions' proportions.

    top keeps a share ``density`` of the entries of each factor, and S_t (R,) are the row sums of
    abs(A_t) over those of abs(top(A_t)): a row that lost much is scaled up. A row that lost all
    counts as 0. Row k of one module is compared with row k of the others, so ranks must be equal.
    Source: Zeng et al. 2025 (arXiv:2502.17159).
    """
    terms = [t for t in terms if t.A_RI.shape[0]]  # the others do not adapt this layer
    ranks = sorted({t.A_RI.shape[0] for t in terms})
    if len(ranks) > 1:
        raise IncompatibleModules.build(
            layer, "RobustMerge compares row k of one module with row k of the others",
            found=f"ranks {ranks}", expected="equal ranks",
            do="bring them to one rank first, or use another method",
        )  # fmt: skip
    A = [_top(t.A_RI, density) for t in terms]
    B = [_top(t.B_OR, density) for t in terms]
    before = torch.stack([t.A_RI.double().abs().sum(1) for t in terms])
    after = torch.stack([a.abs().sum(1) for a in A])
    S_TR = torch.where(after > 0, before / torch.where(after > 0, after, 1.0), 0.0)
    total = S_TR.sum(0)
    S_TR = S_TR / torch.where(total > 0, total, 1.0)
    return [Factor(t.weight, a, b * s) for t, a, b, s in zip(terms, A, B, S_TR, strict=True)]


def _top(factor: Tensor, density: float) -> Tensor:
    X = factor.double()[None]
    trim = trimmed(Stacked(X), density)
    return trim(0, X)[0]


def lego(terms: Sequence[Factor], draws: Draws, rank: int, *, seed: int) -> list[Factor]:
    """Clusters of rank-one units: ``rank`` centroids of the rows [a_k, b_k] of all factors.

    Row k of A_t and column k of B_t, each with sqrt(abs(w_t)), make a unit. K-means (the best of
    RESTARTS starts by k-means++) groups the N units; a centroid is scaled to the mean largest
    entry of its members, and the whole by sqrt(r / K), r the mean rank. With as many clusters as
    units of one module this is the module. Source: Zhao et al. 2024 (arXiv:2409.16167).
    """
    terms = [t for t in terms if t.A_RI.shape[0]]  # the others do not adapt this layer
    units = torch.cat([_units(t) for t in terms])
    # In an order of their own, so that the starts do not depend on that of the modules.
    units = units[torch.unique(units, dim=0, return_inverse=True)[1].argsort(stable=True)]
    clusters = min(rank, len(units))
    labels = _kmeans(units, clusters, draws)
    centroids = torch.stack([_centroid(units[labels == k]) for k in range(clusters)])
    width = terms[0].A_RI.shape[1]
    mean_rank = len(units) / len(terms)
    scale = (mean_rank / clusters) ** 0.5
    return [Factor(scale, centroids[:, :width], centroids[:, width:].mT)]


def _units(term: Factor) -> Tensor:
    root = abs(term.weight) ** 0.5
    signed = -root if term.weight < 0 else root
    return torch.cat([term.A_RI.double() * root, term.B_OR.double().mT * signed], dim=1)


def _centroid(members_MN: Tensor) -> Tensor:
    """Mean of the members, its largest entry brought to the mean of theirs."""
    mean = members_MN.mean(0)
    size = mean.abs().max()
    target = members_MN.abs().amax(1).mean()
    return mean * (target / size) if size > 0 else mean


def _kmeans(units: Tensor, clusters: int, draws: Draws) -> Tensor:
    """Label of every unit, 0 to clusters - 1, none empty."""
    if clusters == len(units):
        return torch.arange(len(units))
    units = torch.linalg.qr(units.mT).R.mT  # the same distances in at most N dimensions
    best, lowest = torch.zeros(len(units), dtype=torch.int64), float("inf")
    for start in range(RESTARTS):
        centers = units[_seeds(units, clusters, draws.uniform(f"start {start}", 0, clusters))]
        labels, cost = _lloyd(units, centers)
        if cost < lowest:
            best, lowest = labels, cost
    return best


def _seeds(units: Tensor, clusters: int, u: Tensor) -> list[int]:
    """k-means++: each start drawn in proportion to the squared distance to those before it."""
    chosen = [int(u[0] * len(units))]
    for k in range(1, clusters):
        distance = torch.cdist(units, units[chosen]).amin(1).square()
        distance[chosen] = 0.0
        if not float(distance.sum()):  # only copies are left
            chosen.append(next(i for i in range(len(units)) if i not in chosen))
            continue
        steps = distance.cumsum(0)
        place = torch.searchsorted(steps, u[k] * steps[-1], right=True)
        chosen.append(int(place.clamp(max=len(units) - 1)))
    return chosen


def _lloyd(units: Tensor, centers: Tensor) -> tuple[Tensor, float]:
    labels = torch.full((len(units),), -1)
    for _ in range(ITERATIONS):
        distance = torch.cdist(units, centers)
        new = distance.argmin(1)
        for k in range(len(centers)):
            if not (new == k).any():  # an empty cluster takes the unit farthest from its own
                crowded = torch.bincount(new, minlength=len(centers))[new] > 1
                own = distance.gather(1, new[:, None])[:, 0]
                new[torch.where(crowded, own, -1.0).argmax()] = k
        if new.equal(labels):
            break
        labels = new
        centers = torch.stack([units[labels == k].mean(0) for k in range(len(centers))])
    cost = torch.cdist(units, centers).gather(1, labels[:, None]).square().sum()
    return labels, float(cost)
