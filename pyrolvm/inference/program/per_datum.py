"""A guide with parameters of its own for each row of the data, for any program with continuous latents per datum.

    q(z_1, ..., z_N) = prod_n q(z_n),    z_n = T(u_n),    u_n ~ N(loc_n, C_n C_n')

with T from the real line to the support of the site, and C_n diagonal ("mean_field") or lower triangular ("full").
Nothing of it is amortised: loc and C are tables with one entry for each row (`plates.row_entries`), of which a
minibatch trains its own. Where the model brings a guide, the entries start where it puts each row, else at the prior.

D. M. Blei, A. Kucukelbir and J. D. McAuliffe, "Variational inference: a review for statisticians", JASA 2017,
section 2.3; M. D. Hoffman et al., "Stochastic variational inference", JMLR 2013 (local and global parameters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import ComposeTransform, IndependentTransform, ReshapeTransform

from pyrolvm.errors import ProgramError, one_of
from pyrolvm.inference.program.rows_plate import at_one_dimension, find_data_plate
from pyrolvm.inference.program.structure import (
    LEFT_TO_PRIOR,
    Plate,
    in_plate,
    is_discrete,
    mask_of,
    sample_sites,
    with_sizes,
)
from pyrolvm.plates import current_rows, row_entries

FAMILIES = ("mean_field", "full")
MOMENT_DRAWS = 64
LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class Local:
    """A local latent as its entries describe it.

    Attributes
    ----------
    plates : tuple of (name, dim, size)
        Vectorised plates besides the data plate.
    axis : int
        The dimension of the rows in the site's batch shape.
    shape : tuple of int
        Of the unconstrained value of one datum.
    batch_dims : int
        Dimensions of the site's batch shape.
    masked : bool
        Whether the model has a mask around the site.
    """

    name: str
    key: str
    plates: tuple[tuple[str, int, int], ...]
    axis: int
    batch_dims: int
    shape: tuple[int, ...]
    transform: Any
    masked: bool = False

    @property
    def event_dims(self) -> int:
        """Dimensions of the unconstrained event."""
        return len(self.shape) - (self.batch_dims - 1)

    @property
    def size(self) -> int:
        """Numbers in the unconstrained event."""
        return math.prod(self.shape[len(self.shape) - self.event_dims :])

    @property
    def is_real(self) -> bool:
        """Whether the site is real as it is."""
        return _is_identity(self.transform)


class PerDatum(nn.Module):
    """A private q(z_n) for each row; given to `fit` as `guide`, by the name "per_datum" or as an instance.

    Latents that the rows share keep the model's own guide, or get an AutoNormal if it has none.

    Parameters
    ----------
    family : {"mean_field", "full"}
        Gaussians of each site in unconstrained space: diagonal, or with all covariances.
    start : callable, optional
        A guide whose means and spreads the entries start from; by default the model's own if it brings one, else the
        prior.
    """

    def __init__(self, family: str = "mean_field", start: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.family, self.in_units = one_of("family", family, FAMILIES), False
        self.sites: tuple[Local, ...] = ()
        self.fresh = True
        self._start = (start,)  # in tuples: modules among them are not this guide's own
        self._program: tuple[Any, Any, Any] = (None, None, None)
        self._others: Callable[..., Any] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """How a run folder names this guide."""
        return {"name": "per_datum", "arguments": {"family": self.family}}

    def bind(self, model: Callable[..., Any], own: Any, shared: Any = None) -> PerDatum:
        """Be the guide of `model`, whose own guide is `own` if it brings one.

        `shared` is the guide of what the rows share, by default `own` too.
        """
        start = self._start[0] or own
        self._program = (model, start, shared or start)
        return self

    @property
    def _model(self) -> Any:
        return self._program[0]

    @property
    def _own(self) -> Any:
        return self._program[1]

    @property
    def _shared(self) -> Any:
        return self._program[2]

    # ------------------------------------------------------------------ the guide

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every local latent of the batch's rows, and what the rows share."""
        if not self.sites:
            self._set_up(args, kwargs)
        if self._others is not None:
            self._others(*args, **kwargs)
        values = {}
        with self._rows():
            for site in self.sites:
                with ExitStack() as stack:
                    for name, dim, size in site.plates:
                        stack.enter_context(pyro.plate(name, size, dim=dim))
                    values[site.name] = pyro.sample(site.name, self.distribution(site))
        return values

    def distribution(self, site: Local) -> dist.TorchDistribution:
        """q of the batch's rows."""
        loc, log_scale, *lower = (row_entries(t).movedim(0, site.axis) for t in self._tables(site))
        if self.in_units:
            at, unit = (row_entries(t).movedim(0, site.axis) for t in self._units(site))
            loc = at + unit * loc
        if not lower:
            found = dist.Normal(loc, log_scale.exp()).to_event(site.event_dims)
        else:
            event = loc.shape[loc.dim() - site.event_dims :]
            flat = loc.reshape(*loc.shape[: loc.dim() - site.event_dims], -1)
            scale = log_scale.reshape(flat.shape).exp().unsqueeze(-1)
            eye = torch.eye(site.size, dtype=loc.dtype, device=loc.device)
            found = dist.MultivariateNormal(flat, scale_tril=scale * (lower[0].tril(-1) + eye))
            if site.event_dims != 1:
                found = dist.TransformedDistribution(
                    found, [ReshapeTransform(torch.Size([site.size]), event)]
                )
        return found if site.is_real else dist.TransformedDistribution(found, [site.transform])

    def _tables(self, site: Local) -> list[Tensor]:
        names = ("loc", "log_scale", "lower") if self._has_lower(site) else ("loc", "log_scale")
        return [getattr(self, f"{site.key}_{name}") for name in names]

    def _units(self, site: Local) -> tuple[Tensor, Tensor]:
        return getattr(self, f"{site.key}_at"), getattr(self, f"{site.key}_unit")

    def entries(self) -> dict[str, Tensor]:
        """Everything that has an entry for each row, by name."""
        own = [f"{s.key}_{kind}" for s in self.sites for kind in ("loc", "log_scale", "lower", "at", "unit")]
        return {name: getattr(self, name).detach() for name in own if hasattr(self, name)}

    @torch.no_grad()
    def count_in_units(self, rows: Tensor) -> None:
        """From now on `loc` of these rows counts from where it is, in units of the scale as it is.

        A step of an optimiser is then as long as it is wide, whatever the units of the latent.
        """
        for site in self.sites:
            loc, log_scale = self._tables(site)[:2]
            if not self.in_units:
                self.register_buffer(f"{site.key}_at", torch.zeros_like(loc))
                self.register_buffer(f"{site.key}_unit", torch.ones_like(loc))
            at, unit = self._units(site)
            at[rows] += unit[rows] * loc[rows]
            unit[rows] = log_scale[rows].exp()
            loc[rows] = 0
        self.in_units = True

    def _has_lower(self, site: Local) -> bool:
        return self.family == "full" and site.size > 1

    @contextmanager
    def _rows(self) -> Iterator[Any]:
        """The data plate, as the model has it."""
        rows = current_rows()
        if rows is None:
            total = len(self._tables(self.sites[0])[0])
            plate = pyro.plate(self._plate.name, total, dim=self._plate.dim)
        elif self._carries_total:
            # a program's own plate may be of more rows than are held
            total = max(rows.total, self._plate.full_size)
            plate = pyro.plate(self._plate.name, total, subsample=rows.indices, dim=self._plate.dim)
        else:
            plate = pyro.plate(self._plate.name, len(rows.indices), dim=self._plate.dim)
        with plate:
            yield plate

    # ------------------------------------------------------------------ made from the program

    def _set_up(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Look at the model once, and make the tables."""
        rows = current_rows()
        if rows is None or self._model is None:
            raise ProgramError(
                "a guide per datum is made by fit: pass it as guide=, pyrolvm.fit(model, x, guide=...)"
            )
        with poutine.block(), torch.no_grad():
            trace = with_sizes(poutine.trace(self._model).get_trace(*args, **kwargs))
        plate = find_data_plate(
            trace, len(rows.indices), named=rows.made, arguments=(*args, *kwargs.values())
        )
        latents = [s for s in sample_sites(trace) if not s["is_observed"] and not _is_left(s)]
        local = [s for s in latents if in_plate(s, plate) and not is_discrete(s["fn"])]
        if plate is None or not local:
            raise ProgramError(
                "guide='per_datum' is for programs with continuous latents of each datum, and this one has none in a "
                "plate over its rows: leave guide out, or declare the rows by `with pyrolvm.data_plate(x):`"
            )
        self._plate = plate = at_one_dimension(plate, local, "per_datum")
        self._carries_total = plate.name in rows.made or plate.full_size > plate.size
        self.sites = tuple(self._local(site, plate, i) for i, site in enumerate(local))
        for site in self.sites:
            self._make_tables(site, rows.total)
        others = [s["name"] for s in latents if all(s is not own for own in local)]
        if others:
            self._others = self._shared_guide(others)

    def _local(self, site: Any, plate: Plate, index: int) -> Local:
        frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != plate.name]
        transform = biject_to(site["fn"].support)
        value = transform.inv(site["value"].detach())
        batch_dims = len(site["fn"].batch_shape)
        shape, axis = list(value.shape), batch_dims + plate.dim
        del shape[axis]
        key = "".join(c if c.isalnum() else "_" for c in site["name"])
        if any(key == s.key for s in self.sites):
            key = f"{key}_{index}"
        plates = tuple((f.name, f.dim, f.size) for f in frames)
        masked = mask_of(site) is not None
        return Local(site["name"], key, plates, axis, batch_dims, tuple(shape), transform, masked)

    def _make_tables(self, site: Local, total: int) -> None:
        for name in ("loc", "log_scale"):
            self.register_parameter(f"{site.key}_{name}", nn.Parameter(torch.zeros(total, *site.shape)))
        if self._has_lower(site):
            batch = site.shape[: len(site.shape) - site.event_dims]
            lower = torch.zeros(total, *batch, site.size, site.size)
            self.register_parameter(f"{site.key}_lower", nn.Parameter(lower))

    def _shared_guide(self, names: list[str]) -> Callable[..., Any]:
        if self._shared is None:
            return AutoNormal(poutine.block(self._model, expose=names))

        def is_hidden(site: Any) -> bool:
            """What it draws for each datum (with what that is computed from), and its plate."""
            return site["name"] == self._plate.name or (
                in_plate(site, self._plate) and site["name"] not in names
            )

        return poutine.block(self._shared, hide_fn=is_hidden)

    # ------------------------------------------------------------------ where it starts

    @torch.no_grad()
    def start(self, rows: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set the entries of `rows` [batch] from the guide that the model brings, or from the prior."""
        source = self._own or self._prior
        traces = [poutine.trace(source).get_trace(*args, **kwargs)]
        known = {s.name: self._exact(s, traces[0]) for s in self.sites}
        if any(found is None for found in known.values()):
            traces += [poutine.trace(source).get_trace(*args, **kwargs) for _ in range(MOMENT_DRAWS - 1)]
        for site in self.sites:
            loc, scale_tril = known[site.name] or self._moments(site, traces)
            self._write(site, rows, loc, scale_tril)

    def _prior(self, *args: Any, **kwargs: Any) -> None:
        """The model's own draws, given those of what the rows share by its guide."""
        model: Any = self._model
        if self._others is not None:
            with poutine.block():
                shared = poutine.trace(self._others).get_trace(*args, **kwargs)
            model = poutine.replay(model, trace=shared)
        model(*args, **kwargs)

    def _exact(self, site: Local, trace: Trace) -> tuple[Tensor, Tensor] | None:
        """(loc, C) of a site that is Gaussian where it is drawn, rows first; None if it is not."""
        node: Any = trace.nodes.get(site.name)
        fn = None if node is None else node["fn"]
        if isinstance(fn, dist.TransformedDistribution) and fn.transforms == [site.transform]:
            fn = fn.base_dist
        elif not site.is_real:
            return None
        if fn is None or (kind := kind_of_gaussian(fn)) is None:
            return None
        full = kind == "full" and self._has_lower(site)
        return fn.mean.movedim(site.axis, 0), (fn.scale_tril if full else fn.stddev).movedim(site.axis, 0)

    def _moments(self, site: Local, traces: list[Trace]) -> tuple[Tensor, Tensor]:
        """Mean and spread of draws in unconstrained space, rows first."""
        if site.name not in traces[0].nodes:
            raise ProgramError(
                f"the guide that the entries of '{site.name}' are to start from does not draw it"
            )
        nodes: list[Any] = [trace.nodes[site.name] for trace in traces]
        draws = torch.stack([site.transform.inv(node["value"]).movedim(site.axis, 0) for node in nodes])
        return draws.mean(0), draws.std(0).clamp_min(LEAST_SCALE)

    def _write(self, site: Local, rows: Tensor, loc: Tensor, spread: Tensor) -> None:
        tables, shape = self._tables(site), (len(rows), *site.shape)
        tables[0].index_copy_(0, rows, loc.expand(shape).to(tables[0].dtype))
        diagonal = spread
        if spread.dim() > loc.dim():  # a lower triangle
            diagonal = spread.diagonal(dim1=-2, dim2=-1)
            lower = (spread / diagonal.unsqueeze(-1)).tril(-1)
            tables[2].index_copy_(0, rows, lower.expand(len(rows), *tables[2].shape[1:]).to(lower.dtype))
        tables[1].index_copy_(0, rows, diagonal.expand(shape).log().to(tables[1].dtype))


def kind_of_gaussian(fn: Any) -> str | None:
    """The family that a distribution is of; None if it is no Gaussian."""
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.TransformedDistribution):
        fn = fn.base_dist
    if isinstance(fn, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return "full"
    return "mean_field" if isinstance(fn, dist.Normal) else None


def _is_left(site: Any) -> bool:
    """Whether no guide is to draw the site: it is summed out, or left to the prior on purpose."""
    return bool(site["infer"].get("enumerate") or site["infer"].get(LEFT_TO_PRIOR))


def _is_identity(transform: Any) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, ComposeTransform) and not transform.parts
