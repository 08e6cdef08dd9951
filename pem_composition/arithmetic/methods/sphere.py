"""Means on the sphere: SLERP of two updates and the Karcher mean of several.

Each layer's update is one vector of its entries, v_t = n_t u_t with norm n_t and direction u_t.
Both means are linear combinations of the v_t with weights that depend on the layer, and those need
only the inner products G_st = <v_s, v_t>: no matrix is formed and the result is exact.

    slerp:    u = sin((1-w) a) / sin(a) u_1 + sin(w a) / sin(a) u_2,   cos(a) = <u_1, u_2>
    karcher:  the u on the sphere with sum_t w_t log_u(u_t) = 0,
              log_u(x) = a / sin(a) (x - cos(a) u)
    result    = (sum_t w_t n_t) u

w_t = c_t / sum_s c_s. The length is interpolated on its own (mergekit's slerp instead adds the two
updates at their own lengths; the two agree where the lengths do). Two updates give the same by
both. An update of length zero has no direction and only enters the length. Updates of one entry
(scalars) are summed with the w_t: no way leads from one direction of a line to the other. Where no
mean is found to 1e-12 (directions spread over more than half of the sphere) there is no result.
Source: Shoemake 1985; Karcher 1977, by gradient descent, with steps halved where they overshoot.

Shape suffixes: T modules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pem_composition.arithmetic.delta import check_double
from pem_composition.errors import PEMError

ITERATIONS = 5000
TOLERANCE = 1e-12  # of the sum of logarithms, in radians
SHORTEST = 2.0**-30  # step, as a share of the full one


def slerp(G_TT: Tensor, shares: list[float], layer: str) -> list[float]:
    """Weights x_t with slerp = sum_t x_t v_t, of two updates."""
    lengths, there = _lengths(G_TT)
    if len(there) < 2:
        return _lone(lengths, there, shares)
    cosine = float((G_TT[0, 1] / lengths[0] / lengths[1]).clamp(-1, 1))
    angle = torch.tensor(cosine, dtype=torch.float64).arccos()
    sine = float(angle.sin())
    if cosine < 0 and sine < 1e-7:
        raise _opposite(layer)
    if sine < 1e-7:  # sin(w a) / sin(a) tends to w
        directions = torch.tensor(shares, dtype=torch.float64)
    else:
        directions = (torch.tensor(shares, dtype=torch.float64) * angle).sin() / sine
    return _at_length(directions, lengths, shares)


def karcher(G_TT: Tensor, shares: list[float], layer: str) -> list[float]:
    """Weights x_t with the Karcher mean = sum_t x_t v_t."""
    lengths, there = _lengths(G_TT)
    if len(there) < 2:
        return _lone(lengths, there, shares)
    w = torch.tensor([shares[t] for t in there], dtype=torch.float64)
    if not float(w.sum()):
        return _at_length(torch.zeros_like(lengths), lengths, shares)
    G = G_TT[there][:, there] / lengths[there, None] / lengths[None, there]
    mean = _karcher(G, w / w.sum(), layer)
    directions = torch.zeros_like(lengths)
    directions[there] = mean
    return _at_length(directions, lengths, shares)


def _karcher(G: Tensor, w: Tensor, layer: str) -> Tensor:
    """Coefficients of the mean direction in the unit vectors whose inner products are G."""
    S, axes = torch.linalg.eigh(G)
    u_TK = axes * S.clamp(min=0).sqrt()  # the unit vectors themselves, in axes of their span
    x = w
    m, x = _unit(u_TK.mT @ x, x, layer)
    value, pull = _pulls(u_TK, m, w, layer)
    for _ in range(ITERATIONS):
        along = float(pull @ (u_TK @ m))
        tangent = u_TK.mT @ pull - along * m
        length = float(tangent.norm())
        if length < TOLERANCE:
            return x
        # Wide directions make the full step overshoot; a shorter one decreases the value.
        step, found, limit = 1.0, math.inf, value * (1 + 1e-15)  # rounding is no increase
        while found > limit and step > SHORTEST:
            angle = torch.tensor(step * length, dtype=torch.float64)
            towards = angle.sin() / length
            coefficients = angle.cos() * x + towards * (pull - along * x)
            to, coefficients = _unit(u_TK.mT @ coefficients, coefficients, layer)
            found, new_pull = _pulls(u_TK, to, w, layer)
            step /= 2
        if found > limit:
            break
        x, m, value, pull = coefficients, to, found, new_pull
    raise PEMError.build(
        layer, "the Karcher mean does not converge: no one direction lies between the updates",
        found=f"a remaining pull of {length:.1e} after {ITERATIONS} steps",
        expected=f"below {TOLERANCE:g}", do="use another method, or leave a module out",
    )  # fmt: skip


def _pulls(u_TK: Tensor, m: Tensor, w: Tensor, layer: str) -> tuple[float, Tensor]:
    """sum_t w_t a_t^2 of the angles to m, and w_t a_t / sin(a_t)."""
    cosines = u_TK @ m
    # The sine as a length keeps the digits that 1 - cos^2 loses where the angle is small.
    sines = (u_TK - cosines[:, None] * m).norm(dim=1)
    angles = torch.atan2(sines, cosines)
    if bool((sines[angles > 1] < 1e-7).any()):
        raise _opposite(layer)
    return float(w @ angles.square()), w * torch.where(sines > 0, angles / sines, 1.0)


def _unit(vector: Tensor, coefficients: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    length = vector.norm()
    if float(length) < 1e-7:
        raise _opposite(layer)
    return vector / length, coefficients / length


def _lengths(G_TT: Tensor) -> tuple[Tensor, list[int]]:
    """Norms of the updates, and the positions of those that are not zero."""
    check_double(G_TT)
    lengths = G_TT.diagonal().clamp(min=0).sqrt()
    return lengths, [t for t, n in enumerate(lengths.tolist()) if n > 0]


def _lone(lengths: Tensor, there: list[int], shares: list[float]) -> list[float]:
    directions = torch.zeros_like(lengths)
    directions[there] = 1.0
    return _at_length(directions, lengths, shares)


def _at_length(directions: Tensor, lengths: Tensor, shares: list[float]) -> list[float]:
    """sum_t directions_t u_t at the interpolated length, as weights of the v_t."""
    length = (torch.tensor(shares, dtype=torch.float64) * lengths).sum()
    weights = length * directions / torch.where(lengths > 0, lengths, 1.0)
    return [float(x) for x in weights]


def _opposite(layer: str) -> PEMError:
    return PEMError.build(
        layer, "the updates point in opposite directions: no direction lies between them",
        do="use another method, or leave a module out",
    )  # fmt: skip
