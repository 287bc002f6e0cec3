"""What a program is made of: its sites and its plates, looked up once, before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta, Unit
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError

LEFT_TO_PRIOR = "left_to_prior"
LOSS = "loss"
"""The mark of a site that is a loss and no density of data."""
BOUND = "bound"
"""A model's distribution with the attribute `bound = True` gives no log-density but an estimate: the mean over q of
log p(z) - log q(z) is part of a bound, for q the guide that marks its own site by infer={"bound": True}. Such a mean is
right, a weight made of it is not."""


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: `size` rows in the batch, `full_size` in the whole data."""

    name: str
    dim: int
    size: int
    full_size: int


@dataclass(frozen=True)
class Site:
    """A sample site of the model; shapes are those in the batch that was looked at.

    Attributes
    ----------
    kind : {"latent", "data", "given", "factor", "deterministic"}
        "given" is a site that was fixed by `poutine.condition` at a value that is no data.
    local : bool
        Whether the site stands in the data plate: one value per datum.
    num_states : int
        Values that are summed over if the site is enumerated, else 1.
    point : bool
        Whether the guide holds the site at a point (a Delta that follows from no draw).
    left_to_prior : bool
        Whether the guide leaves the site to the prior on purpose.
    bound : bool
        Whether what stands for its log-density is an estimate of a bound.
    markov : bool
        Whether it is a step of `pyro.markov`.
    masked : bool
        Whether a mask leaves some of its entries out.
    """

    name: str
    kind: str
    local: bool
    family: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[str, ...]
    enumerated: bool = False
    num_states: int = 1
    in_guide: bool = True
    discrete: bool = False
    point: bool = False
    left_to_prior: bool = False
    bound: bool = False
    markov: bool = False
    masked: bool = False

    @property
    def observed(self) -> bool:
        """Whether the program fixes its value."""
        return self.kind != "latent"


@dataclass(frozen=True)
class Structure:
    """The static structure of a program.

    Attributes
    ----------
    data_plate : Plate or None
        The plate over the rows of the data.
    per_datum : tuple of str
        Parameters of which each row of the training data has its own entry.
    row_tables : tuple of str
        Those of them that are read by `row_entries`, [N, ...]: a minibatch trains its rows of them alone.
    joint_guide : str or None
        A guide site outside the data plate that local latents are computed from.
    takes_any_rows : bool
        Whether the program runs on other numbers of rows than those it was fitted to.
    mixed : tuple of str
        Auxiliary sites of the guide that other draws depend on without being determined by them: the density of those
        draws is an integral that nothing computes.
    tempered : bool
        Whether data are weighted by more or less than one each (a power of the likelihood, row weights), or enter by a
        loss.
    whole : bool
        Whether plates draw a subsample of their rows in training: questions are asked of all rows.
    weighted : bool
        Whether one scale stands around all of model and guide (`poutine.scale`, weights of rows): it belongs outside of
        every logarithm.
    """

    sites: tuple[Site, ...]
    data_plate: Plate | None
    max_plate_nesting: int
    per_datum: tuple[str, ...] = ()
    joint_guide: str | None = None
    takes_any_rows: bool = False
    mixed: tuple[str, ...] = ()
    tempered: bool = False
    row_tables: tuple[str, ...] = ()
    whole: bool = False
    weighted: bool = False

    @property
    def num_data(self) -> int:
        """Rows of the whole data that bounds are per datum of; 1 if the program has no data plate."""
        return self.data_plate.full_size if self.data_plate else 1

    @property
    def chunkable(self) -> bool:
        """Whether rows may be taken apart: some at a time give what they give together."""
        return self.takes_any_rows

    @property
    def latents(self) -> tuple[Site, ...]:
        """The sites that are inferred."""
        return tuple(s for s in self.sites if s.kind == "latent")

    @property
    def observed(self) -> tuple[Site, ...]:
        """The sites that are data."""
        return tuple(s for s in self.sites if s.kind == "data")

    @property
    def enumerated(self) -> tuple[Site, ...]:
        """The latents that are summed out; those that the guide enumerates are drawn from it instead."""
        return tuple(s for s in self.sites if s.enumerated and not s.in_guide)

    @property
    def local_latents(self) -> tuple[Site, ...]:
        """Latents inside the data plate, one value per datum."""
        return tuple(s for s in self.latents if s.local)

    @property
    def global_latents(self) -> tuple[Site, ...]:
        """Latents outside the data plate, shared by all data."""
        return tuple(s for s in self.latents if not s.local)

    @property
    def beside_data(self) -> tuple[str, ...]:
        """Sites outside the data plate that are neither latents nor data: a part of the shared latents' density."""
        if self.data_plate is None:
            return ()
        kinds = ("given", "factor", "deterministic")
        return tuple(s.name for s in self.sites if not s.local and s.kind in kinds)

    @property
    def points(self) -> tuple[str, ...]:
        """Latents of each datum that the guide holds at points: it is an estimate, without a density."""
        return tuple(s.name for s in self.local_latents if s.point)

    @property
    def bound_name(self) -> str:
        """What an ELBO of this pair is: no bound where a latent of each datum has no density in the guide."""
        return "log p(x, z) at a point" if self.points else "ELBO"

    def table(self) -> str:
        """One line per site: name, role, distribution, batch and event shape, plates."""
        return site_table(self.sites)


def site_table(sites: tuple[Site, ...]) -> str:
    """The sites as text, for errors and reports."""
    rows = [("site", "role", "distribution", "batch shape", "event shape", "plates")]
    for s in sites:
        role = {"latent": ("local" if s.local else "global") + " latent", "data": "observed"}.get(
            s.kind, s.kind
        )
        plates = ", ".join(s.plates) or "-"
        rows.append((s.name, role, s.family, str(s.batch_shape), str(s.event_shape), plates))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def sample_sites(trace: Trace) -> Iterator[Any]:
    """The sample sites of a trace, without the subsampling of plates."""
    for site in trace.nodes.values():
        # edges that a guide adds to its prototype make nodes without anything in them
        if site.get("type") == "sample" and not isinstance(site["fn"], _Subsample):
            yield site


def with_sizes(trace: Trace) -> Trace:
    """The trace, in which plates that were made without a size have that of their sites."""
    nodes: dict[str, Any] = trace.nodes
    sites = [s for s in nodes.values() if any(f.size == -1 for f in s.get("cond_indep_stack", ()))]
    found: dict[str, int] = {}
    # a plate made inside such a plate is a site, too, and has no shape
    for site in (s for s in sites if s["type"] == "sample" and not isinstance(s["fn"], _Subsample)):
        values = site["value"].shape[: site["value"].dim() - len(site["fn"].event_shape)]
        for shape in (site["fn"].batch_shape, values):  # one distribution may stand for many observed values
            for frame in site["cond_indep_stack"]:
                size = shape[frame.dim] if frame.vectorized and len(shape) >= -frame.dim else 1
                found[frame.name] = max(found.get(frame.name, 1), size)
    for site in sites:
        site["cond_indep_stack"] = tuple(
            f._replace(size=found.get(f.name, 1), full_size=found.get(f.name, 1)) if f.size == -1 else f
            for f in site["cond_indep_stack"]
        )
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample):
            site["fn"] = _expanded(site)
    return trace


def _expanded(site: Any) -> Any:
    """The distribution for every row of its plates, as Pyro makes it where it knows their sizes."""
    fn, frames = site["fn"], {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    sizes = [frames.get(d, 1) for d in range(min(frames, default=0), 0)]
    shape = torch.broadcast_shapes(fn.batch_shape, sizes)
    return fn if shape == fn.batch_shape else fn.expand(shape)


def given_first(model: Trace, guide: Trace, name: str) -> bool:
    """Whether the guide draws the latents that stand before `name` in the model before it draws `name`.

    Only then may KL(q(name | ...) || p(name | ...)) in closed form stand for log q - log p at the draw: otherwise what
    the prior depends on was drawn knowing the draw of `name`, as in a guide from the data up.
    """
    drawn = [s["name"] for s in sample_sites(guide)]
    prior = [s["name"] for s in sample_sites(model) if s["name"] in drawn]
    return set(prior[: prior.index(name)]) <= set(drawn[: drawn.index(name)])


def in_plate(site: Any, plate: Plate | None) -> bool:
    """Whether a site of a trace stands in the plate."""
    return plate is not None and any(f.name == plate.name for f in site["cond_indep_stack"])


def rows_dim(site: Any, plate: Plate | None) -> int | None:
    """Where the rows of `plate` stand among a site's batch dimensions, negative; None outside it.

    It is the site's own: a program may make a plate of one name at several dimensions, and another plate may have that
    of the data around a site that all data share.
    """
    frames = (
        f for f in site["cond_indep_stack"] if f.vectorized and plate is not None and f.name == plate.name
    )
    return next((f.dim for f in frames), None)


def base(fn: Any) -> Any:
    """A distribution without what is wrapped around it (`Independent`, masks, expansion)."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def is_discrete(fn: Any) -> bool:
    """Whether a distribution's values can be counted; not where it names no support."""
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def mask_of(site: Any) -> Tensor | bool | None:
    """What leaves entries of a latent out; None where nothing does: `mask=False` makes its prior flat."""
    mask: Tensor | bool | None = site["mask"]
    return None if mask is False else mask


def is_factor(site: Any) -> bool:
    """Whether a site is a `pyro.factor`."""
    return bool(site["is_observed"]) and isinstance(base(site["fn"]), Unit)


def is_deterministic(site: Any) -> bool:
    """Whether an observed site is only a name for a value: `pyro.deterministic`, or a Delta of a reparameterisation."""
    return bool(site["infer"].get("_deterministic")) or isinstance(base(site["fn"]), Delta)


def is_bound(fn: Any) -> bool:
    """Whether a distribution's `log_prob` is an estimate of a bound: see `BOUND`."""
    return bool(getattr(base(fn), BOUND, False))


def refuse_bound(structure: Structure, what: str) -> None:
    """Raise `SettingError` if a latent has no density but a bound's estimate, of which `what` would make a weight."""
    names = [s.name for s in structure.sites if s.bound]
    if names:
        raise SettingError(
            f"{what} needs densities, and the model has none for '{names[0]}': what stands for log p({names[0]}) is "
            "an estimate of a bound, right on average and wrong as a weight; read the bound instead, from "
            "fitted.history or the model's own methods"
        )
