"""Whether two contenders compute the same thing: a table that compares different programs is worth nothing."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_STEPS, EXACT = 20, 1e-4
STANDARD_ERRORS = 5.0
EARLY_STEPS, EARLY, LATER = 16, 1e-3, 1e-2


def compare(bounds: Tensor, reference: Tensor, paired: bool, exact: bool = False) -> str:
    """What is wrong with `bounds` [steps] beside `reference` [steps], nats per datum; "" if nothing.

    Both began at the same parameters. exact: the same noise was drawn, so the first steps agree to 1e-4.
    paired: the same rows were seen, so that only Monte Carlo noise differs: the mean difference must lie
    within five standard errors, and 0.1 % of the bound, over the first steps, and 1 % over all (paths part).
    """
    bounds, reference = bounds.double(), reference.double()
    if not bool(torch.isfinite(bounds).all()):
        return "its bound is not finite"
    if exact:
        return _exactly(bounds, reference)
    early = slice(0, EARLY_STEPS)
    problem = _on_average(bounds[early], reference[early], True, EARLY) if paired else ""
    return problem or _on_average(bounds, reference, paired, LATER)


def _exactly(bounds: Tensor, reference: Tensor) -> str:
    ours, theirs = bounds[:EXACT_STEPS], reference[:EXACT_STEPS]
    error = ((ours - theirs).abs() / theirs.abs().clamp(min=1.0)).max().item()
    return f"differs from eager by {error:.1e} for the same noise" if error > EXACT else ""


def _on_average(bounds: Tensor, reference: Tensor, paired: bool, slack: float) -> str:
    difference = (bounds - reference).mean().abs().item()
    error = _standard_error(bounds - reference) if paired else _spread(bounds) + _spread(reference)
    allowed = STANDARD_ERRORS * error + slack * reference.mean().abs().item()
    if difference <= allowed:
        return ""
    return f"another bound: {bounds.mean().item():.4f} against {reference.mean().item():.4f} nats per datum"


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def _spread(values: Tensor) -> float:
    """A standard error that does not take the bound's rise for noise: from differences of neighbours."""
    steps = values.diff()
    return float((steps.square().mean() / 2).sqrt() / len(values) ** 0.5)
