"""LAX: a free-form control variate for continuous latents, with a path through the control variate only.

For reparameterised sites z_l with parameters p (of a Normal: loc and scale), and a network c_l of z_l, the earlier
sites and x,

    h_l = (f(z) - c_l(z_l)) d log q(z_l) / dp + dc_l/dz_l dz_l/dp

f is not differentiated: the cost may jump, or come from outside. Any network leaves h unbiased; it descends sum
|h_l|^2.

W. Grathwohl et al., "Backpropagation through the void", ICLR 2018, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor, nn

from pyrolvm.errors import SettingError, count
from pyrolvm.inference.objectives.base import Estimate
from pyrolvm.inference.objectives.discrete import (
    Chosen,
    DiscreteObjective,
    Run,
    Settled,
    assembled,
    in_cells,
    plainly,
    unwrapped,
)
from pyrolvm.inference.objectives.own import Made, features, fed, network
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import base
from pyrolvm.inference.program.weights import log_densities


@dataclass(frozen=True)
class Path:
    """A site as the guide drew it: its draw with the path to `parameters`, and log q of the draw held."""

    name: str
    draw: Tensor
    log_prob: Tensor
    parameters: list[Tensor]
    event_dims: int
    batch_dims: int


class LAX(DiscreteObjective):
    """The score-function gradient of continuous latents with a learned control variate.

    Parameters
    ----------
    hidden : int
        Units of each layer of a site's network.
    num_layers : int
        Its hidden tanh layers.
    """

    def __init__(self, hidden: int = 100, num_layers: int = 2) -> None:
        super().__init__()
        self.hidden, self.num_layers = count("hidden", hidden), count("num_layers", num_layers)
        self.free = Made()

    def estimated(self, pair: Pair, controls: Any) -> Estimate:
        """The ELBO of a draw, its surrogate, and the variance as the networks' own loss."""
        run, paths = _drawn(pair)
        passed, own = torch.zeros_like(run.cost), torch.zeros_like(run.cost)
        for place, path in enumerate(paths):
            for parameter, h in zip(path.parameters, self._estimated(pair, run, paths, place), strict=True):
                event_dims = parameter.dim() - path.batch_dims
                passed = passed + run.summed(h.detach() * parameter, event_dims)
                own = own + run.summed(h.square(), event_dims)
        self.free.settle()
        terms = {"gradient_square": (run.densities.scale * own).sum()}
        return assembled(pair, [run], run.log_joint + passed, own, **terms)

    def _estimated(self, pair: Pair, run: Run, paths: list[Path], place: int) -> list[Tensor]:
        """h of one site, for each of its parameters."""
        path = paths[place]
        z = path.draw.detach().requires_grad_()
        control = self._control(pair, run, paths, place, z)  # [1, cells]
        slope = torch.autograd.grad(control.sum(), z, create_graph=True)[0]
        signal = run.densities.in_place(run.cost - control)
        found = []
        for parameter in path.parameters:
            scores = torch.autograd.grad(path.log_prob.sum(), parameter, retain_graph=True)[0]
            through = torch.autograd.grad(
                path.draw,
                parameter,
                slope,
                retain_graph=True,
                create_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )[0]
            extra = parameter.dim() - path.batch_dims
            found.append(signal.reshape(*signal.shape, *(1,) * extra) * scores + through)
        return found

    def _control(self, pair: Pair, run: Run, paths: list[Path], place: int, z: Tensor) -> Tensor:
        x = features(pair, run)
        before = [in_cells(p.draw.detach(), run.densities, p.event_dims) for p in paths[:place]]
        parts = [in_cells(z, run.densities, paths[place].event_dims), *before, *([] if x is None else [x])]
        inputs = torch.cat(parts, -1)
        sizes = (inputs.shape[-1], *(self.hidden,) * self.num_layers, 1)
        net = self.free.get(paths[place].name, lambda: network(sizes, nn.Tanh, last=0.0), inputs)
        return fed(net, inputs).reshape(run.cost.shape)


def _drawn(pair: Pair) -> tuple[Run, list[Path]]:
    """A draw of a program of reparameterised latents; raises `SettingError` for any other."""
    found: list[Path] = []

    def choose(site: Any) -> Chosen:
        fn = site["fn"]
        own = unwrapped(fn)
        tensors = [vars(own).get(name) for name in getattr(own, "arg_constraints", {})]
        parameters = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
        if not getattr(fn, "has_rsample", False) or isinstance(own, Delta) or hasattr(own, "base_dist"):
            raise SettingError(
                f"LAX takes reparameterised latents of torch's own families, and '{site['name']}' is "
                f"{type(base(fn)).__name__}: for latent bits use RELAX(), for other discrete ones NVIL()"
            )
        draw = fn.rsample()
        log_prob = fn.log_prob(draw.detach())
        found.append(Path(site["name"], draw, log_prob, parameters, len(fn.event_shape), len(fn.batch_shape)))
        return draw.detach(), None

    with plainly():
        guide = pair.guide(None, Settled(choose))
    if not found:
        raise SettingError(
            "LAX estimates the gradient of continuous latents, and the guide draws none: use Trace_ELBO()"
        )
    model = pair.model(None, lambda f: poutine.replay(f, trace=guide))
    return Run(model, guide, log_densities(model, guide)), found
