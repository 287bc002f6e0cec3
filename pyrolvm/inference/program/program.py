"""A model/guide pair as one function of named tensors, apart from every global of Pyro and torch.

Pyro programs reach their parameters by many routes: `nn.Module` attributes, `pyro.param`,
`pyro.module`, PyroModules, AutoGuides. A `Program` gathers them all under names, keeps a private
parameter store, and runs the pair inside `scope()`, which leaves the process as it found it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import pyro
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import Transform, transform_to
from torch.nn.parameter import is_lazy

from pyrolvm.controls import controlled
from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError, PyrolvmError
from pyrolvm.inference.program.beginnings import begun, present, put_in
from pyrolvm.inference.program.hints import reason_of, why_fails
from pyrolvm.inference.program.masked import Masked
from pyrolvm.inference.program.noise import RUNNING, seeded
from pyrolvm.inference.program.per_datum import PerDatum
from pyrolvm.inference.program.routes import (
    explain_unregistered,
    floating_type,
    leaves,
    modules_of,
    reachable_modules,
    resolve,
)
from pyrolvm.inference.program.running import default_dtype, explained, products_alone_cast, without_handlers
from pyrolvm.inference.program.semi_amortised import SemiAmortised
from pyrolvm.plates import Rows, data_rows

START_ROWS = 4096
"""Rows whose entries are started at once."""
TRAINED: WeakSet[Program] = WeakSet()
"""Programs of fitted models."""


def contract_of(owner: Any) -> Any:
    """`owner` if it follows the suite's contract (`pyrolvm.models.base`), else None."""
    return owner if callable(getattr(type(owner), "knows", None)) else None


class Program:
    """A model and its guide with all that they learn, as data.

    Parameters
    ----------
    model : module or callable
        A module with `.model` and `.guide`, or any Pyro callable.
    guide : callable, AutoGuide instance or AutoGuide class, optional
        Of the model's arguments; None if `model` brings its own.
    device, dtype
        Where its tensors lie, and the floating type they have.
    start : callable, optional
        Pyro's `init_loc_fn`, where the guide is an AutoGuide that is made here.

    Attributes
    ----------
    source
        `model` as it was passed.
    owner
        The object that `model` is a method of, which may know more of itself (see `knows`).
    parameters : dict
        Name -> trainable leaf, unconstrained, updated in place by the engines. Complete after `initialise`.
    buffers : dict
        Name -> what is not trained: buffers of modules, frozen and blocked parameters.
    controls : dict
        Name -> value of the controls that the program reads where nobody schedules them.
    """

    def __init__(
        self,
        model: Any,
        guide: Any = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        start: Callable[..., Tensor] | None = None,
    ) -> None:
        self.source = model
        self.device = device or torch.device("cpu")
        self.model, self.guide = resolve(model, guide, start)
        self.dtype = dtype or floating_type(self.model, self.guide)
        self.owner = getattr(self.model, "__self__", model)
        self.modules = modules_of(model, self.model, self.guide)
        self._functions = (self.model, self.guide)
        if isinstance(self.guide, AutoGuide | PerDatum):
            self.guide = Masked(self.guide, self.model)
        keep_others(self.modules, self._functions)
        for module in self.modules.values():
            module.to(device=self.device, dtype=self.dtype)
        self._frozen = [p for m in self.modules.values() for p in m.parameters() if not p.requires_grad]
        self._blocked: set[str] = set()
        self._reached: dict[str, nn.Module] = {}
        self._store: Any = {"params": {}, "constraints": {}}
        self._awaited: dict[str, Tensor] = {}
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._flows: list[Any] = []
        self._depth = 0
        self.vectorized: bool | None = None
        self.controls: dict[str, float] = {}
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}

    @property
    def contract(self) -> Any:
        """The model itself if it follows the suite's contract (`pyrolvm.models.base`), else None."""
        return contract_of(self.owner)

    def knows(self, name: str) -> bool:
        """Whether the model itself has an answer called `name`: a method of the contract that it overrides."""
        return self.contract is not None and bool(self.contract.knows(name))

    @property
    def row_guide(self) -> PerDatum | None:
        """The guide, if it is one that was made for the program's latents per datum."""
        return self._functions[1] if isinstance(self._functions[1], PerDatum) else None

    @property
    def auto_guide(self) -> AutoGuide | None:
        """The guide as it was passed, if it is one of Pyro's AutoGuides."""
        return self._functions[1] if isinstance(self._functions[1], AutoGuide) else None

    @property
    def reached(self) -> tuple[nn.Module, ...]:
        """The modules of the pair, and those that its functions register."""
        return (*self.modules.values(), *self._reached.values())

    def transform_of(self, name: str) -> Any:
        """From the unconstrained tensor of a parameter to its value; None where they are the same."""
        constraint = self._store["constraints"].get(name)
        return None if constraint is None else transform_to(constraint)

    @property
    def guide_record(self) -> dict[str, Any] | None:
        """How a run folder names a guide that was made for the program; None of others."""
        guide = self._functions[1]
        return guide.record if isinstance(guide, PerDatum | SemiAmortised) else None

    @contextmanager
    def scope(
        self, batch: Batch | None = None, mode: str = "train", *, validate: bool = False
    ) -> Iterator[Rows | None]:
        """Run the pair inside: private parameters, the batch's rows, no handlers of the caller's; all put back after.

        Parameters
        ----------
        batch : Batch, optional
            Whose row numbers and total the data plate gets.
        mode : {"train", "predict"}
            In "train" modules are as the user left them; in "predict" they are in eval mode: no dropout, running
            statistics used and not moved.
        validate : bool
            Pyro's and torch's validation.
        """
        with ExitStack() as stack:
            stack.enter_context(RUNNING)
            if not self._depth:
                stack.enter_context(without_handlers())
                stack.enter_context(pyro.get_param_store().scope(self._store))
                stack.enter_context(pyro.validation_enabled(validate))
                stack.enter_context(default_dtype(self.dtype))
                stack.enter_context(products_alone_cast(self.device))
                if self.device.type != "cpu":
                    stack.enter_context(self.device)
                stack.enter_context(controlled(self.controls))
                stack.enter_context(put_in(self._kept))
                if self._awaited:
                    stack.enter_context(begun(self._awaited, None))
            stack.enter_context(self.evaluating(mode == "predict"))
            rows = None
            if batch is not None:
                rows = stack.enter_context(data_rows(batch.total_rows, batch.indices))
            self._depth += 1
            try:
                yield rows
            except PyrolvmError as error:  # Pyro writes its table of shapes under every error
                error.args = (reason_of(error),)
                raise
            finally:
                self._depth -= 1
                if not self._depth and isinstance(self._functions[1], EasyGuide):
                    self._functions[1].plates.clear()  # it forgets those of a run only if that ends well
                # Pyro turns requires_grad on for every parameter it meets, frozen or not
                for parameter in self._frozen:
                    parameter.requires_grad_(False)

    @contextmanager
    def evaluating(self, evaluate: bool = True) -> Iterator[None]:
        """Modules in eval mode within the block."""
        modules = (*self.modules.values(), *self._reached.values()) if evaluate else ()
        training = [m for module in modules for m in module.modules() if m.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def forget(self) -> None:
        """Let flows forget the value that they saw last: of other parameters, and of a graph that is gone."""
        for flow in self._flows:
            flow.clear_cache()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Trial runs inside leave parameters and buffers (running statistics, say) as they were."""
        before = {k: v.detach().clone() for k, v in self._named_tensors() if not is_lazy(v)}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._named_tensors():
                    # a parameter that did not change is left alone: views of it may wait for their gradients
                    if name in before and not torch.equal(tensor, before[name]):
                        tensor.copy_(before[name])

    def stored(self) -> dict[str, Any]:
        """What Pyro's functions keep of this program, to be put back by `restore`."""
        return {kind: dict(entries) for kind, entries in self._store.items()}

    def restore(self, stored: dict[str, Any]) -> None:
        """Put back what `stored` found: parameters that were made since are gone."""
        self._store.update(stored)

    def initialise(self, batch: Batch, seed: int, *, validate: bool = True) -> None:
        """Run the pair once so that every parameter exists; lazy ones are drawn from `seed`.

        A `pyro.param` that stands in Pyro's own store begins there, as under `SVI`, if it has the shape of its start.
        """
        outside = ({}, {}) if self._depth else present(self.dtype, self.device)
        with self.scope(batch, validate=validate), seeded(seed, self.device), warnings.catch_warnings():
            # the checks of program.checks report a missing site as an error
            warnings.filterwarnings("ignore", "Found .* in .* but not", UserWarning)
            with self.untouched(), begun(*outside), pyro.poutine.trace(param_only=True) as seen:
                with explained(batch, "guide"):
                    trace = pyro.poutine.trace(self.guide).get_trace(*batch.args, **batch.kwargs)
                with explained(batch, "model", lambda: why_fails(trace, self, batch)):
                    pyro.poutine.replay(self.model, trace=trace)(*batch.args, **batch.kwargs)
        self._blocked = set(self._store["params"]) - set(seen.trace.nodes)
        self._reached = self._registered_modules()
        self.collect()
        if unknown := [name for name, tensor in self.tensors().items() if is_lazy(tensor)]:
            raise ProgramError(
                f"'{unknown[0]}' is of a lazy module that the first run does not reach, so that its shape is unknown: "
                "give the module its sizes, or run it once on some data before fit"
            )

    def unmet(self) -> list[str]:
        """Parameters that a run inside `scope` has made and `parameters` lacks: those of a branch taken later."""
        store = pyro.get_param_store()._params
        return [name for name in store if name not in self._store["params"]]

    def gather(self) -> None:
        """Train the parameters that `unmet` lists, too."""
        self._store.update(pyro.get_param_store().get_state())
        self.collect()

    def settle(self) -> None:
        """Trained: should another fit train the same modules, this program keeps the values that it has now."""
        TRAINED.add(self)

    def keep(self) -> None:
        """Run with the values of this moment from now on, whatever becomes of the modules."""
        self._kept = self._kept or [(t, t.detach().clone()) for t in self.tensors().values()]

    def start_rows(self, batch: Batch, seed: int) -> None:
        """Start the entries of a guide per datum, some rows of the whole data at a time."""
        guide = self.row_guide
        if guide is None or not guide.fresh:
            return
        with seeded(seed, self.device):
            for rows in torch.arange(batch.num_rows, device=self.device).split(START_ROWS):
                part = batch.take(rows)
                with self.scope(part, "predict"):
                    guide.start(rows, part.args, part.kwargs)
        guide.fresh = False

    def with_row_guide(self, guide: PerDatum) -> Program:
        """The same model, parameters and modes with another guide, whose tensors are called `rows.` something."""
        other = copy.copy(self)
        other.guide, other._functions, other.vectorized = Masked(guide, self.model), (self.model, guide), None
        other.modules = {**self.modules, "rows.": guide}
        other.parameters, other.buffers = {}, {}
        return other

    def with_auto_guide(self, guide: AutoGuide) -> Program:
        """The same model and parameters with an AutoGuide in place of this one."""
        other = Program(self.source, guide, device=self.device, dtype=self.dtype)
        own = {id(p) for p in self.auto_guide.parameters()} if self.auto_guide is not None else set()
        for kind, entries in self._store.items():
            other._store[kind] = {
                k: v for k, v in entries.items() if id(self._store["params"].get(k)) not in own
            }
        other.controls, other._kept = dict(self.controls), self._kept
        return other

    def hold(self, learned: Collection[str]) -> None:
        """Train the parameters of these names alone."""
        self.buffers |= {k: v for k, v in self.parameters.items() if k not in learned}
        self.parameters = {k: v for k, v in self.parameters.items() if k in learned}

    def adopt(self, prefix: str, modules: dict[str, nn.Module]) -> None:
        """Train further modules with the pair: an objective's baselines or control variates."""
        for name, module in modules.items():
            module.to(device=self.device, dtype=self.dtype)
            self.modules[f"{prefix}{name}."] = module
            self._frozen += [p for p in module.parameters() if not p.requires_grad]
        self.collect()

    def complete_guide(self, names: list[str]) -> None:
        """Let the guide draw the sites that were left to the prior, from the prior.

        Their log p and log q are then the same numbers and cancel in every bound, weight and gradient.
        """
        if names:
            self.guide = _Completed(self.guide, self.model, names)

    def _registered_modules(self) -> dict[str, nn.Module]:
        """Modules that plain functions registered by `pyro.module`: their buffers and modes are the program's too."""
        registered = {id(p) for p in self._store["params"].values()}
        found = {}
        for function in self._functions:
            for name, module in reachable_modules(function):
                if any(id(p) in registered for p in module.parameters()):
                    found[name] = module
        return {n: m for n, m in found.items() if all(m is not own for own in self.modules.values())}

    def collect(self) -> None:
        """Gather all parameters and buffers that exist, and the flows."""
        parts = [m for module in self.reached for m in module.modules()]
        self._flows = [m for m in parts if isinstance(m, Transform)]
        frozen = {id(p) for p in self._frozen}
        seen: set[int] = set()
        store = self._store["params"]
        # a module's parameter that is registered under a block is held like any other
        shown = {id(t) for name, t in store.items() if name not in self._blocked}
        blocked = {id(t) for name, t in store.items() if name in self._blocked} - shown
        for name, tensor in self._named_tensors():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            trainable = isinstance(tensor, nn.Parameter) or name in store
            trainable = trainable and id(tensor) not in blocked
            known = self.parameters if trainable and id(tensor) not in frozen else self.buffers
            known[name] = tensor

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self.modules.items():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                yield prefix + name, tensor
        yield from self._store["params"].items()
        for prefix, module in self._reached.items():
            for name, tensor in module.named_buffers():
                yield f"{prefix}.{name}", tensor

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a file must keep to have this program again."""
        return {**self.parameters, **self.buffers}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], later: Collection[str] = ()) -> None:
        """Copy `tensors` over this program's own, by name; names and shapes must agree.

        Those of `later` are parameters that a branch of the program will make: they begin at these values.
        """
        own = self.tensors()
        self._awaited |= {k: tensors[k] for k in later if k not in own}
        tensors = {k: v for k, v in tensors.items() if k not in self._awaited or k in own}
        for name in own.keys() | tensors.keys():
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            wanted = tuple(own[name].shape) if name in own else "nothing"
            if found != wanted:
                raise ProgramError(
                    f"the saved parameters are of another program: '{name}' is {found} in the file and "
                    f"{wanted} here; build the model with the arguments it was saved with"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.forget()

    def check_registered(self, surrogate: Tensor) -> None:
        """Raise `ProgramError` if the surrogate depends on a leaf that nothing would train."""
        known = {id(p) for p in (*self.parameters.values(), *self.buffers.values(), *self._frozen)}
        for leaf in leaves(surrogate):
            if id(leaf) not in known:
                raise ProgramError(explain_unregistered(leaf, self._functions))


def keep_others(modules: dict[str, nn.Module], functions: tuple[Callable[..., Any], ...]) -> None:
    """Let fitted models keep their values if these modules are theirs and are about to be trained again."""
    reached = [m for function in functions for _, m in reachable_modules(function)]
    mine = {id(t) for m in (*modules.values(), *reached) for t in (*m.parameters(), *m.buffers())}
    with RUNNING:
        for program in list(TRAINED):
            if any(id(t) in mine for t in program.tensors().values()):
                program.keep()


class _Completed:
    """A guide that also draws `names`, as the model does given the guide's own draws."""

    def __init__(self, guide: Callable[..., Any], model: Callable[..., Any], names: list[str]) -> None:
        self.guide, self.model, self.names = guide, model, names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.poutine.trace() as drawn:
            result = self.guide(*args, **kwargs)
        rest = pyro.poutine.replay(self.model, trace=drawn.trace)
        pyro.poutine.block(rest, expose=self.names)(*args, **kwargs)
        return result
