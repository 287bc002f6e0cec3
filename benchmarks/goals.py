"""What the compiled engine is to reach, and whether this run reached it."""

from __future__ import annotations

from dataclasses import dataclass

NUMPYRO = ("numpyro-scan", "numpyro-jit", "numpyro-run")


@dataclass(frozen=True)
class Goal:
    """Time of the fastest of `contenders` over time of the compiled engine: `at_least` this much."""

    against: str
    contenders: tuple[str, ...]
    at_least: float


def _pyro(times: float) -> Goal:
    return Goal("Pyro SVI.step", ("pyro",), times)


AHEAD = Goal("NumPyro (its best)", NUMPYRO, 1.0)
SMALL = (_pyro(30), AHEAD)
MIDDLE = (_pyro(7), AHEAD)
GRAPH = Goal("a CUDA graph by hand", ("cuda-graph",), 0.95)

GOALS: dict[str, dict[str, tuple[Goal, ...]]] = {
    "cpu": {
        **dict.fromkeys(("ppca-64", "schools-normal", "hierarchical"), SMALL),
        **dict.fromkeys(("ppca-256", "ppca-all", "iwae-5", "gmm-all"), MIDDLE),
        "gmm-sampled": (_pyro(30), AHEAD),
        "vae-400": (
            _pyro(1.8),
            AHEAD,
            Goal("its matrix products alone", ("floor",), 1 / 1.25),
            Goal("torch.compile by hand", ("torch-compile",), 1.0),
            Goal("pythae's trainer", ("pythae",), 2.5),
        ),
    },
    "cuda": {
        **dict.fromkeys(
            ("ppca-64", "schools-normal", "hierarchical", "gmm-all", "gmm-sampled"), (_pyro(20),)
        ),
        "vae-400": (_pyro(20), GRAPH),
    },
}
"""Device -> row -> goals, for two cores and for one GPU."""


def outcomes(device: str, row: str, medians: dict[str, float]) -> list[tuple[Goal, float]]:
    """Each goal of the row whose contenders ran, and what was reached."""
    found = []
    for goal in GOALS.get(device, {}).get(row, ()):
        times = [medians[name] for name in goal.contenders if medians.get(name, 0) > 0]
        if times and medians.get("compiled", 0) > 0:
            found.append((goal, min(times) / medians["compiled"]))
    return found
