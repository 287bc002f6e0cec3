"""The log joint of a program as one float64 function of one vector.

All latents z of a program, stacked site by site in unconstrained coordinates z = T(u) with T = `biject_to(support)`:

    log_joint(u) = log p(x, T(u)) + log |T'(u)|,        u: [dim]

Discrete latents that the model enumerates are summed out. The program runs as it is written, whatever its type:
numbers of a lower precision are widened as they are met. Its operations at one u are recorded and replayed, over many
u by `vmap`; a program that cannot be recorded is run again for every u.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.trace_struct import Trace
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pyrolvm.errors import ProgramError
from pyrolvm.inference.engine import graphs
from pyrolvm.inference.engine.recorded import record, settled
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.inference.program.unconstrained import Unconstrained, bijection

CHUNK = 2**21
"""Numbers (vectors x coordinates) that one evaluation may take."""
CHECKED_AT = 4
"""Points at which a record must agree with the program."""


@dataclass(frozen=True)
class Coordinates:
    """Where a site stands in u: `shape` in unconstrained, `constrained` in its own space."""

    name: str
    start: int
    shape: torch.Size
    constrained: torch.Size
    transform: Any

    @property
    def stop(self) -> int:
        """The first coordinate behind it."""
        return self.start + math.prod(self.shape)


class LogJoint:
    """log p(x, T(u)) + log |T'(u)| of a pair's data, its learned parameters held.

    Parameters
    ----------
    pair : Pair
        The program on its whole data.
    jacobian : bool
        Without it, the maximum is the mode in the latents' own space (what an `AutoDelta` finds).
    derivatives : bool
        False where values alone are wanted, once: the program itself is then repeated by `vmap` where that can be,
        which spares the seconds of a record.

    Attributes
    ----------
    dim : int
    sites : tuple of Coordinates
    recorded, batched : bool
        Whether evaluations replay a record, and that of many u at once.

    Raises
    ------
    ProgramError
        A latent is discrete and not enumerated, or has no map from the real numbers; there are no latents; or the
        density is not the same twice.
    """

    def __init__(self, pair: Pair, *, jacobian: bool = True, derivatives: bool = True) -> None:
        self.pair, self.jacobian = pair, jacobian
        self._evaluator: TraceEinsumEvaluator | None = None
        with torch.no_grad(), seeded(0, pair.device), widened(pair.program):
            trace = pair.model()
        self.sites = tuple(_coordinates(trace, {s.name for s in pair.structure.enumerated}))
        if not self.sites:
            raise ProgramError("the program has no continuous latents to find a posterior of")
        self.dim = self.sites[-1].stop
        self._graph: Callable[..., Tensor] | None = None
        self.batched = False
        self._check_fixed()
        if derivatives or not self._repeat():
            self._record()

    # ------------------------------------------------------------------ values and derivatives

    def __call__(self, u: Tensor) -> Tensor:
        """Log joint of u [..., dim]: [...], nats. Differentiable."""
        flat = u.reshape(-1, self.dim)
        parts = [self._batch(part) for part in flat.split(max(1, CHUNK // self.dim))]
        return torch.cat(parts).reshape(u.shape[:-1])

    def slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(log joint [...], gradient [..., dim]) at u [..., dim], both detached."""
        values, slopes = [], []
        for part in u.detach().reshape(-1, self.dim).split(max(1, CHUNK // self.dim)):
            at = part.clone().requires_grad_()
            with torch.enable_grad():
                value = self._batch(at)
                (slope,) = torch.autograd.grad(value.sum(), at)
            values.append(value.detach())
            slopes.append(slope)
        return torch.cat(values).reshape(u.shape[:-1]), torch.cat(slopes).reshape(u.shape)

    def hessian(self, u: Tensor) -> Tensor:
        """Second derivatives [dim, dim] at u [dim], symmetric."""
        H = torch.cat([self.products(u, v) for v in torch.eye(self.dim, dtype=u.dtype).split(64)])
        return (H + H.T) / 2

    def products(self, u: Tensor, v: Tensor) -> Tensor:
        """Hessian at u [dim] times each row of v [rows, dim]: [rows, dim]."""
        at = u.detach().expand(len(v), self.dim).clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self._batch(at).sum(), at, create_graph=True)
            if not slope.requires_grad:  # linear in u
                return torch.zeros_like(v)
            (product,) = torch.autograd.grad((slope * v).sum(), at)
        return product

    # ------------------------------------------------------------------ coordinates

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The latents at u [..., dim], each in its own space: [..., shape of the site]."""
        return {s.name: s.transform(self._part(u, s)) for s in self.sites}

    def coordinates(self, values: dict[str, Tensor]) -> Tensor:
        """u [dim] of one value of each latent."""
        parts = [s.transform.inv(values[s.name].double().reshape(s.constrained)) for s in self.sites]
        return torch.cat([p.reshape(-1) for p in parts])

    def scalars(self, u: Tensor) -> tuple[Tensor, list[str]]:
        """What a user reads: every entry of every latent in its own space, [..., entries], and its name."""
        found, names = [], []
        for name, value in self.values(u).items():
            rest = value.shape[u.dim() - 1 :]
            found.append(value.reshape(*u.shape[:-1], -1))
            names += [name + element(i, rest) for i in range(math.prod(rest))]
        return torch.cat(found, -1), names

    def _part(self, u: Tensor, site: Coordinates) -> Tensor:
        return u[..., site.start : site.stop].reshape((*u.shape[:-1], *site.shape))

    # ------------------------------------------------------------------ running the program

    def _batch(self, u: Tensor) -> Tensor:
        """Log joint of u [rows, dim]: [rows]."""
        if self._graph is not None:
            return self._graph(u)
        return torch.stack([self.at(row) for row in u])

    def at(self, u: Tensor) -> Tensor:
        """Log joint of one u [dim] by running the program: []."""
        place = Unconstrained({s.name: self._part(u, s) for s in self.sites})
        with seeded(0, self.pair.device), widened(self.pair.program):
            trace = self._trace(place)
            total = self._total(trace)
            if self.jacobian:
                total = total + sum(t.sum() for t in place.log_abs_det.values())
            return total.double()

    def _trace(self, place: Unconstrained) -> Trace:
        structure = self.pair.structure
        if not structure.enumerated:
            return self.pair.model(None, place)
        enum = poutine.enum(first_available_dim=-1 - structure.max_plate_nesting)
        return self.pair.model(None, place, enum)

    def _total(self, trace: Trace) -> Tensor:
        if not self.pair.structure.enumerated:
            return torch.as_tensor(trace.log_prob_sum())
        if self._evaluator is None:
            self._evaluator = TraceEinsumEvaluator(trace, True, self.pair.structure.max_plate_nesting)
        return self._evaluator.log_prob(trace)

    def _check_fixed(self) -> None:
        u = torch.zeros(self.dim, dtype=torch.float64)
        with torch.no_grad():
            first = self.at(u)
            with seeded(1, self.pair.device), widened(self.pair.program):
                torch.manual_seed(1)
                place = Unconstrained({s.name: self._part(u, s) for s in self.sites})
                again = self._total(self._trace(place))
                again = again + sum(t.sum() for t in place.log_abs_det.values()) * self.jacobian
        if not torch.allclose(first, again.double(), equal_nan=True):
            raise ProgramError(
                "the model's density at one value of its latents is random (dropout, a draw that is no site)"
            )

    def _repeat(self) -> bool:
        """Replace runs of the program by one of many u at once, if it can be and agrees; whether it does."""
        points = self._points(2)
        with suppress(Exception), torch.no_grad():  # what looks at its values cannot be
            wanted = torch.stack([self.at(u) for u in points])
            many = torch.func.vmap(self.at)
            if torch.allclose(many(points), wanted, 1e-9, 1e-9, equal_nan=True):
                self._graph, self.batched = many, True
        return self.batched

    def _points(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(number, self.dim, generator=generator, dtype=torch.float64)

    def _record(self) -> None:
        """Replace runs of the program by a record of one, if it agrees with the program at other points."""
        points = self._points(CHECKED_AT)
        with torch.no_grad():
            wanted = torch.stack([self.at(u) for u in points])
        _, slope = self.slope(points[:1])
        # with writes in place removed, which a few functions (the logarithm of Pyro's enumeration) do not allow
        for pure in (True, False):
            for repeated in (torch.func.vmap, _one_by_one):
                with suppress(Exception):  # what cannot be recorded is run
                    self._graph = repeated(self._recording(points[0], pure))
                    self.batched = repeated is torch.func.vmap
                    right = torch.allclose(self._batch(points), wanted, 1e-9, 1e-9, equal_nan=True)
                    # some operations have values and no derivatives, or others than the program
                    right = right and torch.allclose(
                        self.slope(points)[1][:1], slope, 1e-6, 1e-6, equal_nan=True
                    )
                    if right:
                        self.products(points[0], points[:1])
                        return
        self._graph, self.batched = None, False

    @torch.no_grad()
    def _recording(self, u: Tensor, pure: bool) -> Callable[[Tensor], Tensor]:
        """The operations of one run at u [dim], as a function of it."""

        def run(u: Tensor) -> Tensor:
            return self.at(u)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph, constants = record(run, (u,), pure=pure)
        _copied_anew(graph)
        _put_together(graph)
        constants = settled(graph, 1, tuple(t.detach() for t in constants), fresh=pure)
        constants = _numbered(graph, constants)
        if graphs.written_inputs(graph):
            raise ProgramError("the record writes to what it reads")
        return partial(_with, graph, constants)

    @property
    def recorded(self) -> bool:
        """Whether evaluations replay a record."""
        return self._graph is not None


def _coordinates(trace: Trace, summed: set[str]) -> Iterator[Coordinates]:
    start = 0
    for site in sample_sites(trace):
        if site["is_observed"] or site["name"] in summed:
            continue
        if site["fn"].support.is_discrete:
            raise ProgramError(
                f"'{site['name']}' is discrete, so the log joint has no derivatives: sum it out by "
                "infer={'enumerate': 'parallel'}"
            )
        transform = bijection(site)
        u = transform.inv(site["value"].double())
        found = Coordinates(site["name"], start, u.shape, site["value"].shape, transform)
        start = found.stop
        yield found


def _with(graph: fx.GraphModule, constants: tuple[Tensor, ...], u: Tensor) -> Tensor:
    return graph(u, *constants)


def _one_by_one(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of u [dim] as one of u [rows, dim]: where `vmap` has no rule for an operation."""
    return lambda u: torch.stack([function(row) for row in u])


def _copied_anew(graph: fx.GraphModule) -> None:
    """Let what is copied over a tensor take its place: the copy itself has no derivative."""
    aten, call = torch.ops.aten, graph.graph.call_function
    node: Any
    for node in list(graph.graph.nodes):
        if node.target is not aten.copy.default:
            continue
        layout = node.meta[graphs.LAYOUT]
        with graph.graph.inserting_before(node):
            new = call(aten.expand.default, (node.args[1], list(layout.shape)))
            new = call(aten._to_copy.default, (new,), {"dtype": layout.dtype})
        new.meta[graphs.LAYOUT] = layout
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def _put_together(graph: fx.GraphModule) -> None:
    """Write what is put into a part of a tensor as its parts side by side, of which `vmap` has the derivatives."""
    aten, call = torch.ops.aten, graph.graph.call_function
    node: Any
    for node in list(graph.graph.nodes):
        if node.target not in (aten.slice_scatter.default, aten.select_scatter.default):
            continue
        into, values, dim, *place = node.args if len(node.args) > 2 else (*node.args, 0)
        size, one = into.meta[graphs.LAYOUT].shape[dim], node.target is aten.select_scatter.default
        if one:
            place = [place[0] % size, place[0] % size + 1]
        start, end, step = slice(*place, *(None,) * (3 - len(place))).indices(size)
        with graph.graph.inserting_before(node):
            if step == 1:
                middle = call(aten.unsqueeze.default, (values, dim)) if one else values
                before = call(aten.slice.Tensor, (into, dim, 0, start))
                behind = call(aten.slice.Tensor, (into, dim, max(start, end), size))
                new = call(aten.cat.default, ([before, middle, behind], dim))
            else:
                places = call(aten.arange.start_step, (start, end, step))
                indices = [None] * (dim % len(into.meta[graphs.LAYOUT].shape)) + [places]
                new = call(aten.index_put.default, (into, indices, values))
        new.meta[graphs.LAYOUT] = node.meta[graphs.LAYOUT]
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def _numbered(graph: fx.GraphModule, constants: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Let constant masks index by the numbers of their places: `vmap` takes no mask. Returns the constants."""
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    known = dict(zip(placeholders[1:], constants, strict=True))
    numbers: dict[fx.Node, list[fx.Node]] = {}
    last = placeholders[-1]
    for mask, value in list(known.items()):
        if value.dtype == torch.bool:
            numbers[mask] = []
            for places in value.nonzero(as_tuple=True):
                with graph.graph.inserting_after(last):
                    last = graph.graph.placeholder(f"places_{len(known)}")
                known[last] = places
                numbers[mask].append(last)
    node: Any
    for node in graph.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("aten.index"):
            indices = node.args[1]
            wanted = [n for index in indices for n in numbers.get(index, [index])]
            node.args = (node.args[0], wanted, *node.args[2:])
            if wanted == list(indices) and len(wanted) == 1 and "index_put" in str(node.target):
                _fill(node, known)
    graph.recompile()
    return tuple(known.values())


def _fill(node: Any, known: dict[fx.Node, Tensor]) -> None:
    """`x[mask] = number` of a mask that depends on u, as torch.where."""
    values, (mask,), number, *accumulate = node.args
    shape = known[number].shape if number in known else number.meta[graphs.LAYOUT].shape
    if not shape and mask.meta[graphs.LAYOUT].dtype == torch.bool and not any(accumulate):
        node.target = torch.ops.aten.where.self
        node.args = (mask, number, values)


def element(index: int, shape: torch.Size) -> str:
    """`[1,2]` of entry `index` of an array of this shape; nothing of a number."""
    if not shape:
        return ""
    places = []
    for size in reversed(shape):
        index, place = divmod(index, size)
        places.append(str(place))
    return f"[{','.join(reversed(places))}]"


class _Widen(TorchFunctionMode):
    """Make every number of a lower precision a float64 before it is used."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_wide, args), **{k: _wide(v) for k, v in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    if type(value) in (list, tuple):  # not torch.Size, which must stay one
        return type(value)(map(_wide, value))
    narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.double() if narrow else value


@contextmanager
def widened(program: Program) -> Iterator[None]:
    """Run the program in float64 inside, whatever its own type; its tensors stay as they are."""
    before = program.dtype
    program.dtype = torch.float64
    try:
        with _Widen():
            yield
    finally:
        program.dtype = before
