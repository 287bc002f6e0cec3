"""A guide that begins at the encoder's answer and climbs the bound of each datum from there, in training too.

    lambda_0 = encoder(x_n),    lambda_{k+1} = lambda_k + step(grad L_n(lambda_k)),    q(z_n | x_n) = q(z_n; lambda_K)

for Gaussian q with lambda the mean and the log of the scales. L_n is the bound of the datum at draws fixed once
(antithetic, of unit variance), so that q(z | x) is a function of x and of the parameters like any encoder. A step goes
in units of the scales, at most one of them: half way to the optimum of a Gaussian posterior by default. A row that did
not gain at the fixed draws keeps what the encoder gives.

Encoder and decoder are trained through the steps, which takes second derivatives (Kim et al. 2018, "Semi-amortized
variational autoencoders", algorithm 1). To take the steps as constants is no cheaper way: the encoder then runs off to
make up for what the steps do, and a model of digits lost nine nats by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyrolvm.errors import ProgramError, count, positive
from pyrolvm.inference.program.per_datum import kind_of_gaussian
from pyrolvm.inference.program.rows_plate import at_one_dimension, find_data_plate
from pyrolvm.inference.program.running import without_handlers
from pyrolvm.inference.program.structure import Plate, in_plate, sample_sites, with_sizes
from pyrolvm.plates import current_rows
from pyrolvm.seeds import Purpose, derived_seed

MADE_BY_FIT = (
    "a semi-amortised guide is made by fit: pass it as guide=, pyrolvm.fit(model, x, guide=SemiAmortised())"
)


class Gaussian(NamedTuple):
    """q of one site: loc + exp(log_ratio) C e, with C what the encoder gives and log_ratio 0 at the start.

    Attributes
    ----------
    loc, log_ratio : Tensor [batch..., event...]
    spread : Tensor
        C: scales [batch..., event...], or a lower triangle [batch..., D, D].
    """

    loc: Tensor
    log_ratio: Tensor
    spread: Tensor
    event_dim: int

    @classmethod
    def of(cls, fn: Any, wanted: bool) -> Gaussian:
        """A Gaussian site of the encoder; `wanted` is whether gradients go on to the encoder."""
        loc = fn.mean
        spread = fn.scale_tril if kind_of_gaussian(fn) == "full" else fn.stddev
        if not (wanted and loc.requires_grad):
            loc, spread = loc.detach().requires_grad_(), spread.detach()
        # a leaf of its own would look like a parameter that nobody trains
        return cls(loc, 0.0 * loc, spread, fn.event_dim)

    @property
    def is_full(self) -> bool:
        """Whether C is a triangle."""
        return self.spread.dim() > self.loc.dim()

    @property
    def distribution(self) -> Any:
        """As Pyro draws it."""
        ratio = self.log_ratio.exp()
        if self.is_full:
            return dist.MultivariateNormal(self.loc, scale_tril=ratio.unsqueeze(-1) * self.spread)
        return dist.Normal(self.loc, ratio * self.spread).to_event(self.event_dim)

    def at(self, noise: Tensor) -> Tensor:
        """The draw of standard normal noise."""
        moved = (self.spread @ noise.unsqueeze(-1)).squeeze(-1) if self.is_full else self.spread * noise
        return self.loc + self.log_ratio.exp() * moved

    def step(self, by_loc: Tensor, by_log_ratio: Tensor, size: float) -> tuple[Tensor, Tensor]:
        """What to add to loc and log_ratio, from the gradients: at most one scale and a factor of e."""
        scale = self.distribution.stddev
        return scale * (size * scale * by_loc).clamp(-1, 1), (0.5 * size * by_log_ratio).clamp(-1, 1)


class SemiAmortised(nn.Module):
    """The model's own guide, refined for each datum; given to `fit` as `guide`, by the name "semi_amortised" or built.

    For Gaussian latents of each datum. What else the guide draws stays as it is, and is held meanwhile: a Gaussian at
    its mean, another at a draw.

    Parameters
    ----------
    num_refinements : int
        K, steps of each datum in each step of the training, and whenever the guide is asked.
    step_size : float
        1 goes to the optimum of a Gaussian posterior at once.
    num_draws : int
        Fixed draws that the bound of a datum is averaged over, an even number. Few draws are fitted instead of the
        posterior: take more for more steps.
    encoder : callable, optional
        The guide to begin at; by default the one that the model brings.

    Raises
    ------
    SettingError
        A setting is not valid.
    ProgramError
        There is no guide to begin at, or it draws no Gaussian for each datum.
    """

    def __init__(
        self,
        num_refinements: int = 5,
        step_size: float = 0.5,
        num_draws: int = 8,
        encoder: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_refinements = count("num_refinements", num_refinements)
        self.step_size = positive("step_size", step_size)
        self.num_draws = 2 * -(-count("num_draws", num_draws) // 2)
        self.encoder = encoder
        self._functions: tuple[Any, Any] = (
            None,
            None,
        )  # in a tuple: modules among them are not this guide's own
        self.sites: dict[str, str] = {}
        self.at_once: int | None = None

    @property
    def record(self) -> dict[str, Any]:
        """How a run folder names this guide."""
        names = ("num_refinements", "step_size", "num_draws")
        return {"name": "semi_amortised", "arguments": {name: getattr(self, name) for name in names}}

    def bind(self, model: Callable[..., Any], own: Any) -> SemiAmortised:
        """Be the guide of `model`, whose own guide is `own` if it brings one."""
        begin = self.encoder or own
        if begin is None:
            raise ProgramError(
                "guide='semi_amortised' begins at the guide that a model brings, and this one brings none: pass "
                "guide=pyrolvm.SemiAmortised(encoder=guide), with a guide that draws Gaussians for each datum"
            )
        self._functions = (model, begin)
        self.__wrapped__ = begin  # where its networks are found
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draw what the model's own guide draws, from the refined Gaussians."""
        model, begin = self._functions
        if model is None:
            raise ProgramError(MADE_BY_FIT)
        wanted = torch.is_grad_enabled()
        with without_handlers(), torch.enable_grad():
            refined = self._refined(wanted, args, kwargs)
        with _Drawn({name: q.distribution for name, q in refined.items()}):
            return begin(*args, **kwargs)

    # ------------------------------------------------------------------ the climb

    def _refined(self, wanted: bool, args: tuple, kwargs: dict[str, Any]) -> dict[str, Gaussian]:
        model, begin = self._functions
        with _AtMeans():
            guide = poutine.trace(begin).get_trace(*args, **kwargs)
        held = {s["name"]: s["value"].detach() for s in sample_sites(guide) if not s["is_observed"]}
        if not self.sites:
            self._set_up(guide, held, args, kwargs)
        nodes: dict[str, Any] = guide.nodes
        start = {name: Gaussian.of(nodes[name]["fn"], wanted) for name in self.sites}

        def bound(q: dict[str, Gaussian]) -> Tensor:
            entropy: Any = sum(self._by_row(g.log_ratio, g.event_dim) for g in q.values())
            return entropy + self._expected(model, held, q, args, kwargs)

        q, first = start, bound(start)
        value = first
        for _ in range(self.num_refinements):
            q = self._stepped(q, value, through=wanted)
            value = bound(q)
        rose = (value > first).detach()
        return {name: self._better(rose, start[name], g, wanted) for name, g in q.items()}

    def _stepped(self, q: dict[str, Gaussian], value: Tensor, *, through: bool) -> dict[str, Gaussian]:
        """Every q one step further; `value` [rows] is its bound."""
        at = [t for g in q.values() for t in (g.loc, g.log_ratio)]
        slopes = torch.autograd.grad(value.sum(), at, create_graph=through, retain_graph=True)
        with torch.set_grad_enabled(through):
            pairs = zip(q.values(), slopes[::2], slopes[1::2], strict=True)
            steps = [g.step(by_loc, by_ratio, self.step_size) for g, by_loc, by_ratio in pairs]
        return {
            name: g._replace(loc=g.loc + to_loc, log_ratio=g.log_ratio + to_ratio)
            for (name, g), (to_loc, to_ratio) in zip(q.items(), steps, strict=True)
        }

    def _better(self, rose: Tensor, start: Gaussian, end: Gaussian, wanted: bool) -> Gaussian:
        """The end where a row's bound rose, else the start."""
        shape = [1] * end.loc.dim()
        shape[self.plate.dim - end.event_dim] = -1
        here = rose.reshape(shape)
        loc, log_ratio = (
            torch.where(here, b, a) for a, b in ((start.loc, end.loc), (start.log_ratio, end.log_ratio))
        )
        return (
            end._replace(loc=loc, log_ratio=log_ratio)
            if wanted
            else end._replace(loc=loc.detach(), log_ratio=log_ratio.detach())
        )

    def _expected(self, model: Any, held: dict, q: dict[str, Gaussian], args: tuple, kwargs: dict) -> Tensor:
        """The log joint averaged over the fixed draws, [rows]: all at once where the program allows it."""
        draws = {name: g.at(self._noise(name)) for name, g in q.items()}
        if self.at_once is None:
            each = [held | {name: z[i] for name, z in draws.items()} for i in range(self.num_draws)]
            found = [self._log_joint(poutine.condition(model, data=values), args, kwargs) for values in each]
            return torch.stack(found).mean(0)
        wide = {}
        for name, z in draws.items():
            inner = z.dim() - 1 - q[name].event_dim
            wide[name] = z.reshape(len(z), *(1,) * (-self.at_once - 1 - inner), *z.shape[1:])
        with pyro.plate("_fixed_draws", self.num_draws, dim=self.at_once):
            return self._log_joint(poutine.condition(model, data=held | wide), args, kwargs) / self.num_draws

    def _log_joint(self, conditioned: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """log p(x_n, z_n) [rows] up to what does not depend on z_n, without N/B."""
        trace = with_sizes(poutine.trace(conditioned).get_trace(*args, **kwargs))
        trace.compute_log_prob()
        local = [s for s in sample_sites(trace) if in_plate(s, self.plate)]
        plate = next(f for f in local[0]["cond_indep_stack"] if f.name == self.plate.name)
        share = plate.size / (plate.full_size or plate.size)
        return share * sum(self._by_row(site["log_prob"], 0) for site in local)

    def _by_row(self, t: Tensor, event_dim: int) -> Tensor:
        """Sums [rows] of a tensor [batch..., event...]."""
        by_row = t.movedim(self.plate.dim - event_dim, 0)
        return by_row.reshape(len(by_row), -1).sum(1)

    # ------------------------------------------------------------------ made from the program

    def _set_up(self, guide: Trace, held: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> None:
        """Find the Gaussians of each datum, and draw their noise."""
        rows = current_rows()
        if rows is None:
            raise ProgramError(MADE_BY_FIT)
        conditioned = poutine.condition(self._functions[0], data=held)
        model = with_sizes(poutine.trace(conditioned).get_trace(*args, **kwargs))
        plate = find_data_plate(
            model, len(rows.indices), named=rows.made, arguments=(*args, *kwargs.values())
        )
        local = [s for s in sample_sites(guide) if in_plate(s, plate) and s["name"] in model.nodes]
        found = {s["name"]: s["fn"] for s in local if kind_of_gaussian(s["fn"])}
        alone = [s["name"] for s in sample_sites(model) if not s["is_observed"]]
        if alone:
            raise ProgramError(
                f"guide='semi_amortised' climbs log p(x, z), and '{alone[0]}' is drawn by the model alone: sum it out "
                "by hand, or draw it in the guide"
            )
        if plate is None or not found:
            raise ProgramError(
                "guide='semi_amortised' refines the Gaussians that a guide draws for each datum, and this one draws "
                "none: leave guide out, or use guide='per_datum'"
            )
        inside = [s for trace in (model, guide) for s in sample_sites(trace) if in_plate(s, plate)]
        self.plate = at_one_dimension(plate, inside, "semi_amortised")
        for index, (name, fn) in enumerate(found.items()):
            self.sites[name] = f"noise_{index}"
            self.register_buffer(self.sites[name], _antithetic(self.num_draws, fn, plate, index))
        depth = max(len(s["fn"].batch_shape) for s in sample_sites(model))
        q = {name: Gaussian.of(fn, False) for name, fn in found.items()}
        self._try_at_once(-1 - max(depth, -plate.dim), held, q, args, kwargs)

    def _try_at_once(self, dim: int, held: dict, q: dict[str, Gaussian], args: tuple, kwargs: dict) -> None:
        """Find whether a plate of draws around the model gives what one draw after the other does."""
        one_by_one = self._expected(self._functions[0], held, q, args, kwargs)
        try:
            self.at_once = dim
            together = self._expected(self._functions[0], held, q, args, kwargs)
            same = torch.allclose(one_by_one, together, rtol=1e-3, atol=1e-3)
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ):  # the program reads shapes: it takes no draws before its rows
            same = False
        self.at_once = dim if same else None

    def _noise(self, name: str) -> Tensor:
        return getattr(self, self.sites[name])


def _antithetic(num_draws: int, fn: Any, plate: Plate, index: int) -> Tensor:
    """Noise [draws, batch..., event...], 1 at the data plate; its mean is 0 and the variance of each entry 1.

    Where half the draws are at least as many as the entries, these are uncorrelated too: the bound of a Gaussian
    posterior is then exact.
    """
    mean = fn.mean
    shape = list(mean.shape)
    shape[plate.dim - fn.event_dim] = 1
    generator = torch.Generator().manual_seed(derived_seed(0, Purpose.REFINE, index))
    half = torch.randn(num_draws // 2, math.prod(shape), generator=generator, dtype=torch.float64)
    if len(half) >= half.shape[1]:
        half = torch.linalg.qr(half).Q
    half = (half / half.square().mean(0).sqrt()).reshape(-1, *shape)
    return torch.cat([half, -half]).to(mean)


class _AtMeans(Messenger):
    """Give Gaussian sites their means."""

    def _pyro_sample(self, msg: Any) -> None:
        if kind_of_gaussian(msg["fn"]) and msg["value"] is None:
            msg["value"], msg["done"] = msg["fn"].mean, True


class _Drawn(Messenger):
    """Draw these sites from these distributions."""

    def __init__(self, distributions: dict[str, Any]) -> None:
        super().__init__()
        self.distributions = distributions

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.distributions:
            msg["fn"] = self.distributions[msg["name"]]
