"""A Pyro program as the two densities of annealing, in unconstrained coordinates.

Each local latent z is T(u) with T = `biject_to(support)`, so that with start p_0(z) = p(z) or q(z | x)

    log start(u) = log p_0(T(u)) + log |T'(u)|,      log ratio(u) = log p(x, T(u)) - log p_0(T(u))

where the Jacobian cancels in the ratio. All latents of a datum are one vector u [dim].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.engine.recorded import Recorded
from pyrolvm.inference.posterior.evidence.hmc import slope_of
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import rows_dim, sample_sites
from pyrolvm.inference.program.unconstrained import Unconstrained, bijection

STARTS = ("prior", "guide")


class Target:
    """Start and joint density of a pair's rows, for many chains at once.

    Parameters
    ----------
    pair : Pair
        The program on the rows.
    chains : int
        Chains per datum.
    start : {"prior", "guide"}
        p_0.
    held : dict, optional
        Values of the latents outside the data plate; drawn from the guide by default.

    Attributes
    ----------
    initial : tensor [chains, rows, dim]
        u drawn from the start.

    Raises
    ------
    SettingError
        A latent is discrete, there are none, or the guide has no density to start from.
    """

    def __init__(
        self, pair: Pair, chains: int, start: str = "prior", held: dict[str, Tensor] | None = None
    ) -> None:
        self.pair, self.chains, self.start = pair, chains, start
        self.held = pair.held_draw(chains) if held is None else held
        guide = pair.guide(chains, given=self.held) if start == "guide" else Trace()
        drawn = {s["name"]: s["value"] for s in sample_sites(guide)} if start == "guide" else {}
        model = pair.model(chains, given={**drawn, **self.held})
        self.sites = {s["name"]: s for s in _annealed(model, self.held)}
        self.auxiliary = {s["name"] for s in sample_sites(guide) if s["infer"].get("is_auxiliary")}
        self.shapes: dict[str, torch.Size] = {}
        self.initial = self.coordinates({name: s["value"] for name, s in self.sites.items()})
        if start == "guide":
            self._check_guide(guide)
        self._recorded, self._slope = Recorded(), slope_of(self.densities)

    def slope(self, u: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient [chains, rows, dim] of log f_beta at u, and `densities`; recorded, since called often."""
        gradient, log_start, log_ratio = self._recorded(self._slope, u, beta)
        return gradient, log_start, log_ratio

    def coordinates(self, values: dict[str, Tensor]) -> Tensor:
        """u [chains, rows, dim] of the latents' values [chains, rows, ...]."""
        u = {}
        for name, site in self.sites.items():
            value = values[name].reshape(site["value"].shape)
            u[name] = bijection(site).inv(value)
            self.shapes[name] = u[name].shape
        return torch.cat([self._by_row(name, u[name]) for name in self.sites], -1)

    def densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(log start, log ratio) at u [chains, rows, dim]: each [chains, rows], nats."""
        place = Unconstrained(self._by_site(u))
        model = self.pair.model(self.chains, place, given=self.held)
        guide = self._guide_at(place) if self.start == "guide" else Trace()
        found = self.pair.densities(model, guide, self.held)
        jacobian = sum(self._by_row(name, self._full(t)).sum(-1) for name, t in place.log_abs_det.items())
        if self.start == "guide":
            return found.log_guide + jacobian, found.log_weight
        return found.log_prior + jacobian, found.log_likelihood

    def _guide_at(self, place: Unconstrained) -> Trace:
        """The guide with its draws set to the place; for an AutoGuide, at the auxiliary sites."""
        values = dict(self.held)
        for name, value in place.values.items():
            auxiliary = f"{name}_unconstrained"
            made = auxiliary in self.auxiliary
            values.update({auxiliary: place.u[name]} if made else {name: value})
        return self.pair.guide(self.chains, given=values)

    def _check_guide(self, guide: Trace) -> None:
        """The density at its own draws must equal the one reported when they were drawn."""
        said = self.pair.log_guide(guide, self.held)
        place = Unconstrained(self._by_site(self.initial))
        self.pair.model(self.chains, place, given=self.held)
        found = self.pair.log_guide(self._guide_at(place), self.held)
        points = [s["name"] for s in sample_sites(guide) if type(s["fn"]).__name__ == "Delta"]
        pointless = [n for n in points if n in self.sites and f"{n}_unconstrained" not in self.auxiliary]
        if pointless or not torch.allclose(said, found, rtol=1e-2, atol=1e-2):
            raise SettingError(
                "the guide's density cannot be evaluated away from its own draws (a point mass, or a draw made "
                f"from auxiliary ones) for {', '.join(pointless or self.sites)}: use start='prior'"
            )

    # ------------------------------------------------------------------ one vector per datum

    def _row_dim(self, name: str) -> int:
        """The data's dimension of a site's value [chains, plates..., event...]; 1 without a data plate."""
        rows = rows_dim(self.sites[name], self.pair.structure.data_plate)
        return 1 if rows is None else 1 + self.pair.structure.max_plate_nesting + rows

    def _by_row(self, name: str, t: Tensor) -> Tensor:
        """[chains, plates..., event...] -> [chains, rows, dim]."""
        t = t.movedim(self._row_dim(name), 1)
        return t.reshape(self.chains, self.pair.num_rows, -1)

    def _by_site(self, u: Tensor) -> dict[str, Tensor]:
        """[chains, rows, dim] -> each latent's coordinates in the shape of its site."""
        sizes = [math.prod(s) // (self.chains * self.pair.num_rows) for s in self.shapes.values()]
        found = {}
        for (name, shape), part in zip(self.shapes.items(), u.split(sizes, -1), strict=True):
            rows = self._row_dim(name)
            moved = torch.empty(shape, device="meta").movedim(rows, 1)
            found[name] = part.reshape(moved.shape).movedim(1, rows)
        return found

    def _full(self, t: Tensor) -> Tensor:
        """A tensor over the plates, padded on the left to all of their dimensions."""
        plates = 1 + self.pair.structure.max_plate_nesting
        return t.reshape((1,) * (plates - t.dim()) + tuple(t.shape))


def _annealed(model: Trace, held: dict[str, Tensor]) -> list[dict[str, Any]]:
    sites = [s for s in sample_sites(model) if not s["is_observed"] and s["name"] not in held]
    if not sites:
        raise SettingError(
            "method='ais' anneals latents of each datum, and this program has none: use 'exact'"
        )
    for site in sites:
        if site["fn"].support.is_discrete:
            raise SettingError(
                f"method='ais' moves latents along gradients, but '{site['name']}' is discrete: use "
                "method='importance', or 'exact' if it has few values"
            )
    return sites
