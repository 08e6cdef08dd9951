"""How long OpenMP's threads wait for each other before they sleep. No torch.

Between two parallel regions the threads of libgomp spin, 300,000 rounds or some ten milliseconds
where the system does not say otherwise. Beside other work each of them burns the share of a core
that the thread it waits for would need (measured: scripts/benchmarks/company.py).
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN = "GOMP_SPINCOUNT"
ROUNDS = "1000"
WAITING = (SPIN, "OMP_WAIT_POLICY")  # either says how to wait


def share_processors(environment: MutableMapping[str, str]) -> None:
    """Let threads sleep soon, where the user has not said how they wait.

    OpenMP reads it once, when torch is loaded; processes that are started from here inherit it.
    """
    if not any(name in environment for name in WAITING):
        environment[SPIN] = ROUNDS
