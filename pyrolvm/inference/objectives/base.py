"""What an objective is: a bound to report, a surrogate to descend, and terms by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.infer
import torch
from pyro.ops.provenance import detach_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyrolvm.controls import Schedule, value_of
from pyrolvm.errors import SettingError
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.plain import PlainPair
from pyrolvm.inference.program.structure import sample_sites


class Estimate(NamedTuple):
    """One stochastic estimate over a batch, in nats, scaled to the whole data.

    Attributes
    ----------
    bound : tensor []
        The lower bound on log p(x); higher is better.
    surrogate : tensor []
        Minimise it; its gradient estimates that of -bound. Its value means nothing.
    terms : dict
        What the bound is made of, and whatever else is worth a column of the history, by name; nan where not defined.
        An ELBO has `log_likelihood`, E_q[log p(x|z)], and `kl`, E_q[log q(z) - log p(z)].
    own_loss : tensor [] or None
        A loss of the objective's own modules (of a baseline, of a control variate): they descend it and nothing else
        does. If None, they descend the surrogate with all other parameters.
    """

    bound: Tensor
    surrogate: Tensor
    terms: dict[str, Tensor]
    own_loss: Tensor | None = None


class Objective(pyro.infer.ELBO):
    """An objective for any Pyro program: runs under `fit` and under `pyro.infer.SVI`.

    A new objective defines `estimate`. It may hold `nn.Module`s as attributes: they are trained with the pair and kept
    in checkpoints and run folders. Under plain SVI they are shown to Pyro's parameter store.
    """

    def estimate(self, pair: Pair, controls: Mapping[str, Any]) -> Estimate:
        """The bound on one batch.

        Parameters
        ----------
        pair : Pair
            The program on the batch; run it by `pair.draw()`, `pair.guide()`, `pair.model(given=...)`.
        controls : mapping
            Name -> present value (a number, or a 0-d tensor in a compiled loop) of this objective's `controls()` and
            all others of the run.
        """
        raise NotImplementedError(f"{type(self).__name__} must define estimate(self, pair, controls)")

    def controls(self) -> dict[str, Schedule]:
        """The named schedules that this objective brings, with their defaults: numbers, or functions of the share."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What must agree for a run to be resumed: plain values, by name."""
        plain = {k: v for k, v in vars(self).items() if isinstance(v, bool | int | float | str)}
        return {k: v for k, v in plain.items() if not k.startswith("_") and v != float("inf")}

    def modules(self) -> dict[str, nn.Module]:
        """The modules that are trained with the pair, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, nn.Module)}

    # ------------------------------------------------------------------ under pyro.infer.SVI

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar with the value of -bound (nats, summed over data) and the gradient of the surrogate."""
        lazy = any(is_lazy(p) for module in self.modules().values() for p in module.parameters())
        if not lazy:
            self._register()
        controls = {name: value_of(name, schedule, 1.0) for name, schedule in self.controls().items()}
        result = self.estimate(PlainPair(model, guide, args, kwargs), controls)
        if lazy:  # their shapes are known now
            self._register()
        surrogate = result.surrogate + self._own_correction(result)
        return -result.bound.detach() + (surrogate - surrogate.detach())

    def _register(self) -> None:
        """Show Pyro the modules, so that SVI trains them."""
        for name, module in self.modules().items():
            pyro.module(f"{type(self).__name__}.{name}", module)

    def _own_correction(self, result: Estimate) -> Any:
        """What makes the gradient of the own modules that of their own loss, and changes no other."""
        own = [p for module in self.modules().values() for p in module.parameters()]
        if result.own_loss is None or not own or not torch.is_grad_enabled():
            return 0.0
        wanted = torch.autograd.grad(result.own_loss, own, retain_graph=True, materialize_grads=True)
        found = torch.autograd.grad(result.surrogate, own, retain_graph=True, materialize_grads=True)
        return sum((p * (w - f)).sum() for p, w, f in zip(own, wanted, found, strict=True))

    @torch.no_grad()
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """-bound in nats, summed over the data."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """-bound in nats; gradients are accumulated in the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Any:
        """Asked for by `pyro.infer.ELBO`; objectives run their pair themselves."""
        return PlainPair(model, guide, args, kwargs).draw()


def check_reparameterised(guide: Trace, what: str) -> None:
    """Raise `SettingError` for a draw of the guide without a path derivative; `what` needs it, in words."""
    for site in sample_sites(guide):
        if not site["is_observed"] and not getattr(site["fn"], "has_rsample", False):
            raise SettingError(
                f"{what} through the draws, and '{site['name']}' ({type(site['fn']).__name__}) is not reparameterised: "
                "use TraceGraph_ELBO()"
            )


class TraceObjective(Objective):
    """One of Pyro's ELBOs that is a mean over pairs of traces: the loop over particles."""

    def __init__(self, elbo: pyro.infer.ELBO) -> None:
        self.elbo = elbo

    def settings(self) -> dict[str, Any]:
        """Those of Pyro's object."""
        return {"name": type(self.elbo).__name__, **Objective.settings(self.elbo)}  # type: ignore[arg-type]

    def estimate(self, pair: Pair, controls: Mapping[str, Any]) -> Estimate:
        """The mean over particles."""
        program, batch = pair.program, pair.batch
        traces = self.elbo._get_traces(program.model, program.guide, batch.args, batch.kwargs)
        runs = list(traces)
        parts = zip(*(self.parts(model, guide) for model, guide in runs), strict=True)
        bound, surrogate, kl = (_mean(part, self.elbo.num_particles) for part in parts)
        # the expected log-likelihood is what the bound and the KL leave
        terms = {"log_likelihood": (bound + kl).detach(), "kl": kl.detach()}
        return Estimate(
            bound.detach(), surrogate, terms | site_terms(pair, runs, self.elbo.num_particles, self.site_kl)
        )

    def parts(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any, Any]:
        """(bound, surrogate, KL) of one pair of traces."""
        raise NotImplementedError

    def site_kl(self, model_trace: Trace, guide_trace: Trace, name: str) -> Any:
        """The part of the KL that is one latent's."""
        return log_ratio(model_trace, guide_trace, name)


def _mean(values: Sequence[Any], count: int) -> Tensor:
    """The sum of numbers or tensors [] over `count`, as a tensor."""
    total = sum(values[1:], values[0])
    total = total if isinstance(total, Tensor) else torch.tensor(float(total))
    return total / count if count > 1 else total


def log_ratio(model_trace: Trace, guide_trace: Trace, name: str) -> Any:
    """log q - log p of one latent at the draw, scaled as the traces are."""
    nodes: Any = guide_trace.nodes, model_trace.nodes
    return nodes[0][name]["log_prob_sum"] - nodes[1][name]["log_prob_sum"]


def site_terms(
    pair: Pair,
    runs: Sequence[tuple[Trace, Trace]],
    num_draws: int,
    kl: Callable[..., Any] = log_ratio,
) -> dict[str, Tensor]:
    """The KL of each latent of a datum, `kl_z1`, `kl_z2`, ..., where a program has several; else nothing.

    A mean over `num_draws`; vectorised particles are many in one run.
    Nothing under plain `pyro.infer.SVI`, which reads no terms.
    """
    if isinstance(pair, PlainPair):
        return {}
    local = [
        s for s in pair.structure.local_latents if s.in_guide and s.name != "weight"
    ]  # a control's column
    if len(local) < 2 or any(s.enumerated for s in local):
        return {}
    if any(s["infer"].get("is_auxiliary") for _, guide in runs for s in sample_sites(guide)):
        return {}
    totals = {s.name: sum(kl(model, guide, s.name) for model, guide in runs) for s in local}
    plain = {name: torch.as_tensor(detach_provenance(total)).detach() for name, total in totals.items()}
    return {f"kl_{name}": total / num_draws for name, total in plain.items()}


def kl_term(model_trace: Trace, guide_trace: Trace) -> Any:
    """sum over the guide's sites of log q(z) - log p(z), one draw, scaled as the traces are."""
    total: Any = 0.0
    for site in sample_sites(guide_trace):
        total = total + site["log_prob_sum"]
        if site["name"] in model_trace.nodes:
            total = total - model_trace.nodes[site["name"]]["log_prob_sum"]
    return detach_provenance(total)
