"""The contract of a model: an `nn.Module` with `model` and `guide` of the same arguments, and what else it may know.

Everything that a model may tell the rest of the package stands in `LatentVariableModel`, with a default that means
"unknown". Nothing else is looked for in a model.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, ProgramError, SettingError, count
from pyrolvm.models.pieces import plain
from pyrolvm.plates import current_rows, data_plate


class LatentVariableModel(nn.Module):
    """A generative model p(x, z) and its guide q(z | x), with all learnables held in itself.

    Two methods of the same arguments make a model::

        class Mine(LatentVariableModel):
            def __init__(self, data_dim): ...
            def model(self, x): ...   # x: [batch, data_dim], or None to generate
            def guide(self, x): ...

    Every parameter exists after construction; the data plate is `self.data_plate(x)`; the observed site tolerates
    `x=None`. The other methods are optional. Their defaults mean "unknown", and `knows` tells whether a model
    overrides one:

    ===================  =====================================================  ==================================
    method               what the model knows                                   who uses it
    ===================  =====================================================  ==================================
    `check_data`         which data it can have generated, and in which dtype   every function that takes data
    `check_condition`    which second argument it takes, and in which dtype     every function that takes data
    `check_fit`          whether the end of a fit is no answer                  `fit`, after the last step
    `log_marginal`       the exact log p(x)                                     the evidence, method "exact"
    `initialise_from`    starting values from the data                          `fit(initialise=True)`, if `fresh`
    `controls`           schedules that it brings to training                   `fit`
    `objective`          the objective that it is usually trained by            `fit`, unless told another
    `decode`             the mean of p(x | z)                                   reconstructions, traversals
    `columns`            numbers of training, beside those of the objective     the history
    ===================  =====================================================  ==================================

    Attributes
    ----------
    constructor : dict of str to object
        The arguments it was built with, by name: a run folder keeps them to build it again.
    fresh : bool
        True from construction until the parameters are fitted, loaded or set. Only a fresh model is started from
        the data by `fit`; code that writes to the parameters by hand sets `fresh = False`.
    takes_labels : bool
        Whether `model` and `guide` are of (x, y): the labels of a `Dataset` are then passed as y.
    """

    constructor: dict[str, Any]
    fresh: bool = True
    takes_labels: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> LatentVariableModel:
        """Note the arguments in `constructor`."""
        self = super().__new__(cls)
        # nn.Module.__setattr__ needs a finished __init__; copies and unpickling pass no arguments
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        given = {k: v for k, v in bound.arguments.items() if k != "self"}
        object.__setattr__(self, "constructor", {k: plain(v) for k, v in given.items()})
        return self

    # ------------------------------------------------------------------ the program

    def model(self, x: Tensor | None = None) -> Any:
        """The generative program p(x, z).

        Parameters
        ----------
        x : Tensor [batch, ...] or None
            The data; None generates as many rows as the trainer asks for, or one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define model(self, x)")

    def guide(self, x: Tensor | None = None) -> Any:
        """The approximate posterior q(z | x), of the same arguments as `model`."""
        raise NotImplementedError(f"{type(self).__name__} must define guide(self, x)")

    def data_plate(self, x: Any = None) -> pyro.plate:
        """The plate over the rows of `x`; under `fit` it carries the number of rows of the whole data.

        Outside `fit` it also shows Pyro the module's parameters, so that `pyro.infer.SVI` trains them.
        """
        if current_rows() is None:
            register(self)
        return data_plate(x)

    # ------------------------------------------------------------------ what it may know

    def knows(self, name: str) -> bool:
        """Whether this model's class overrides the optional method `name` of the contract.

        A method that is overridden may still return None where the answer is unknown for these settings.
        """
        return getattr(type(self), name) is not getattr(LatentVariableModel, name)

    def check_data(self, x: Tensor) -> Tensor | None:
        """Refuse, before the first step, data the model cannot have generated.

        Parameters
        ----------
        x : Tensor [rows, ...]
            The first argument of `model`, integers as integers.

        Returns
        -------
        Tensor [rows, ...] or None
            The data as the model wants them (counts as floats, say: `self.as_floats(x)`); None for `x` unchanged.

        Raises
        ------
        DataError
            For data outside the support of p(x); by default, for values that are not finite.
        """
        check_finite(x)
        return None

    def check_condition(self, y: Tensor) -> Tensor | None:
        """Refuse, before the first step, labels or covariates that the model cannot take.

        Parameters
        ----------
        y : Tensor [rows, ...]
            The second argument of `model`, finite.

        Returns
        -------
        Tensor [rows, ...] or None
            As the model wants it; None for `y` unchanged.
        """
        return None

    def check_fit(self, x: Tensor) -> None:
        """Refuse a fit whose end is no answer, such as a collapsed component.

        Parameters
        ----------
        x : Tensor [rows, ...]
            The training data, as `check_data` returned them.

        Raises
        ------
        DivergenceError
            If the fit is degenerate. By default no fit is refused.
        """

    def log_marginal(self, x: Tensor) -> Tensor | None:
        """The exact log p(x) at the present parameters.

        Parameters
        ----------
        x : Tensor [batch, ...]

        Returns
        -------
        Tensor [batch] or None
            In nats; None where there is no closed form.
        """
        return None

    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Set the parameters to starting values found from the data. By default they stay as constructed.

        Parameters
        ----------
        x : Tensor [rows, ...]
            Training data, as `check_data` returned them.
        seed : int
            Of random starts.
        """

    def controls(self) -> dict[str, float | Callable[[float], float]]:
        """Named schedules that this model brings to training, {} by default.

        Returns
        -------
        dict of str to float or callable
            A constant, or a function of the share of the run that is done, from 0 to 1.
        """
        return {}

    def objective(self) -> str | tuple[str, dict[str, Any]] | None:
        """The objective that this model is usually trained by.

        Returns
        -------
        str, tuple or None
            A name of `pyrolvm.inference.objectives.OBJECTIVES`, or (name, its settings); None for an ELBO that suits
            the program.
        """
        return None

    def decode(self, z: Tensor) -> Tensor | None:
        """The mean of p(x | z).

        Parameters
        ----------
        z : Tensor [..., latent_dim]

        Returns
        -------
        Tensor [..., data_dim] or None
            In the units of the data; None where the model has no decoder.
        """
        return None

    def columns(self) -> dict[str, Tensor]:
        """Numbers [] that a step leaves behind, by name, {} by default: further columns of the history."""
        return {}

    # ------------------------------------------------------------------ help for models

    def as_floats(self, x: Tensor) -> Tensor:
        """`x` [rows, ...] in the dtype of the parameters if it holds integers or booleans; else `x` itself."""
        if x.is_floating_point():
            return x
        parameter = next(self.parameters(), None)
        return x.to(torch.get_default_dtype() if parameter is None else parameter.dtype)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load as `nn.Module` does; the model is no longer fresh."""
        self.fresh = False
        return super().load_state_dict(*args, **kwargs)


def check_sizes(data_dim: int, latent_dim: int) -> tuple[int, int]:
    """The sizes of a linear model as ints.

    Raises
    ------
    SettingError
        Unless both are whole numbers with 1 <= latent_dim <= data_dim: more directions than columns are not identified.
    """
    data_dim, latent_dim = count("data_dim", data_dim), count("latent_dim", latent_dim)
    if latent_dim > data_dim:
        raise SettingError(f"latent_dim={latent_dim} must lie between 1 and data_dim={data_dim}")
    return data_dim, latent_dim


def check_finite(x: Tensor, hint: str = "") -> None:
    """Raise `DataError` naming the first row and column of `x` [rows, ...] that is not finite.

    `hint` ends the sentence about a missing value.
    """
    where = first_row_where(x, lambda part: ~torch.isfinite(part)) if x.is_floating_point() else None
    if where is None:
        return
    value = x[tuple(where)].item()
    raise DataError(
        f"the data hold {value} at row {where[0]}, column {tuple(where[1:]) if len(where) != 2 else where[1]}: "
        f"drop or fill such rows first, e.g. x[np.isfinite(x).all(axis=1)]{hint if value != value else ''}"
    )


def first_row_where(x: Tensor, wrong: Callable[[Tensor], Tensor]) -> list[int] | None:
    """The index of the first entry of `x` that `wrong` marks, or None.

    Parameters
    ----------
    x : Tensor [rows, ...]
        Looked at some rows at a time: data mapped from a file may be larger than memory.
    wrong : callable
        From some rows to booleans of their shape.
    """
    first = 0
    for part in x.split(max(1, 2**22 // max(1, x[:1].numel()))) if x.dim() else (x,):
        marks = wrong(part)
        if bool(marks.any()):
            row, *rest = marks.nonzero()[0].tolist()
            return [first + row, *rest]
        first += len(part)
    return None


def check_columns(x: Tensor, data_dim: int, model: str) -> None:
    """Raise `DataError` naming the `model` unless `x` is [rows, data_dim]."""
    if x.dim() == 2 and x.shape[1] == data_dim:
        return
    raise DataError(
        f"{model} was built for data of shape [rows, {data_dim}] but got {list(x.shape)}: "
        f"build it with data_dim={x.shape[-1] if x.dim() else 1} or pass x.reshape(-1, {data_dim})"
    )


_serials: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_next_serial = itertools.count()


def register(module: nn.Module) -> None:
    """Show Pyro the trainable parameters of `module`, under names that no other instance has.

    Called by `data_plate`, so that plain `pyro.infer.SVI` trains them. Unlike `pyro.module`, which takes a
    name from the caller, a second instance cannot fall on the first one's entries in the global store
    and stay untrained; frozen parameters stay out.
    """
    if module not in _serials:  # by identity: a deep copy gets a number of its own
        _serials[module] = next(_next_serial)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        entry = f"{type(module).__name__}-{_serials[module]}.{name}"
        if pyro.param(entry, parameter) is not parameter:
            raise ProgramError(
                f"Pyro's parameter store holds another tensor as {entry!r}, so that SVI would train that one "
                "and not the module's: call pyro.clear_param_store(), restore the module by load_state_dict, "
                "and keep its parameters contiguous"
            )
