"""Draws of a guide, taken again by their Pareto-smoothed importance weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrolvm.errors import SettingError, warn_user
from pyrolvm.inference.log_joint import declined
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.psis import khat_threshold
from pyrolvm.inference.log_joint.resampling import Weights, smoothed
from pyrolvm.inference.log_joint.verdict import weigh
from pyrolvm.inference.program.draws import Draws, draws_of, tidy
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Structure, refuse_bound
from pyrolvm.seeds import Purpose, derived_seed

FEWEST, TIMES = 4000, 10
"""Draws that S are taken from: at least so many, and so many times S."""


class CorrectedDraws(dict[str, Tensor]):
    """Latent site -> [draws, ...], with the k-hat of the weights.

    Attributes
    ----------
    khat : float
        Above 0.7 the draws are not to be relied on; the largest over rows where each row has weights of its own.
    effective_share : float
        Effective sample size over the number of draws that were weighed; the smallest over rows.
    """

    def __init__(self, values: dict[str, Tensor], weights: list[Weights]) -> None:
        super().__init__(values)
        self.khat = max(w.khat for w in weights)
        self.effective_share = min(w.effective_share for w in weights)


def corrected(pair: Pair, num_samples: int, seed: int) -> CorrectedDraws:
    """`num_samples` draws for the rows of the pair, put right."""
    structure = pair.structure
    refuse_bound(structure, "corrected=True")
    points = [s.name for s in structure.latents if s.point]
    hidden = [*points, *structure.mixed]
    if hidden:
        raise SettingError(
            f"corrected=True weighs draws by densities, and the guide has none for '{hidden[0]}'"
        )
    many = max(FEWEST, TIMES * num_samples)
    generator = torch.Generator().manual_seed(derived_seed(seed, Purpose.GUIDE, 1))
    if declined(pair) is None:
        found = weigh(pair, log_joint := LogJoint(pair), seed, many)
        chosen = found.weights.resample(num_samples, generator)
        return _warned(CorrectedDraws(_tidy(pair, log_joint.values(found.u[chosen])), [found.weights]), many)
    with torch.no_grad(), seeded(derived_seed(seed, Purpose.GUIDE, 2), pair.device):
        draws = draws_of(pair, many)
    return _warned(_resampled(structure, draws, num_samples, generator), many)


def _tidy(pair: Pair, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`values` [draws, shape in the program] as `posterior` gives them."""
    with torch.no_grad(), seeded(0, pair.device):
        nodes = dict[str, Any](pair.guide().nodes)
    nesting, found = pair.structure.max_plate_nesting, {}
    for name, value in values.items():
        missing = nesting + 1 + len(nodes[name]["fn"].event_shape) - value.dim()
        value = value.reshape(len(value), *(1,) * missing, *value.shape[1:]).to(pair.program.dtype)
        found[name] = tidy(pair.structure, nodes[name], value)
    return found


def _resampled(
    structure: Structure, draws: Draws, num_samples: int, generator: torch.Generator
) -> CorrectedDraws:
    """Whole draws by one weight each; where nothing is shared, each row by its own."""
    log_weight = draws.log_weight
    if structure.global_latents or structure.data_plate is None:
        assert draws.global_log_prior is not None
        assert draws.global_log_guide is not None
        log_weight = (log_weight.sum(1) + draws.global_log_prior - draws.global_log_guide)[:, None]
    weights = [smoothed(column.cpu()) for column in log_weight.T]
    chosen = torch.stack([w.resample(num_samples, generator) for w in weights], 1).to(log_weight.device)
    if chosen.shape[1] == 1:
        return CorrectedDraws({n: v[chosen[:, 0]] for n, v in draws.values.items()}, weights)
    rows = torch.arange(chosen.shape[1], device=log_weight.device)
    return CorrectedDraws({n: v[chosen, rows] for n, v in draws.values.items()}, weights)


def _warned(found: CorrectedDraws, num_draws: int) -> CorrectedDraws:
    if found.khat > khat_threshold(num_draws):
        warn_user(
            f"the corrected draws are not to be relied on: k-hat {found.khat:.2f} of {num_draws} weights, "
            f"{found.effective_share:.1%} of them effective; take a richer guide"
        )
    return found
