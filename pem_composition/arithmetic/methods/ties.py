"""TIES: trim, elect a sign per entry, average what agrees with it.

    X_t = top_d(dW_t);   g = sign(sum_t X_t)   (election=total)   or sign(sum_t sign(X_t))
    f = mean over {t: sign(X_t) = g} of X_t, 0 where no X_t has that sign

Source: Yadav et al. 2023 (arXiv:2306.01708); an exact tie elects the plus sign, as in PEFT. The
trim is per layer, as in PEFT and mergekit (the paper's code trims the whole model at once).

The mean is over the number of agreeing modules: it cannot explode with coefficients of mixed
sign, as a division by the sum of the agreeing weights does. A coefficient scales its update
before the vote (PEFT votes before weighting; equal for equal coefficients).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Entries, Rule
from pem_composition.arithmetic.methods.magnitude import trimmed


def ties(entries: Entries, draws: Draws, *, density: float, election: str) -> Rule:
    """The elected mean of the trimmed updates."""
    trim = trimmed(entries, density)
    return lambda start, X_TNI: elected_mean(trim(start, X_TNI), election)


def agreeing(X_TNI: Tensor, election: str) -> Tensor:
    """True where an entry has the elected sign; a zero never has one."""
    votes = X_TNI if election == "total" else X_TNI.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    return X_TNI.sign() == elected


def elected_mean(X_TNI: Tensor, election: str) -> Tensor:
    """Mean of the entries that have the elected sign."""
    agree = agreeing(X_TNI, election)
    return (X_TNI * agree).sum(0) / agree.sum(0).clamp(min=1)
