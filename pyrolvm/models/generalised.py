"""Generalised Bayes: a belief is updated by a loss instead of a likelihood (Bissiri, Holmes and Walker 2016).

For a loss l(z, x), a weight w > 0 and a prior p(z),

    p_w(z | x) = exp(-w sum_n l(z, x_n)) p(z) / Z_w(x).

With l(z, x) = -log p(x | z) and w = eta it is the power posterior, with w = 1 the posterior. A loss is no
likelihood: nothing can be drawn from it, exp(-w l) is the density of no datum, and Z_w is not p(x). In a trace a
loss is a factor, so that predictive draws, leave-one-out scores and observed data do not take it for data.

A loss is declared inside a program, where the latents and the rows are at hand::

    def location(x):                                       # x: [batch]
        centre = pyro.sample("centre", dist.Normal(0.0, 10.0))
        with pyrolvm.data_plate(x):
            pyrolvm.loss("distance", (x - centre).abs())   # [batch]

    fit(GeneralisedBayes(location, weight=0.8), x, guide="AutoNormal")

or given beside a program that only draws the latents, as `loss(z, *data)`, z being what the program returns.

P. G. Bissiri, C. C. Holmes and S. G. Walker, "A general framework for updating belief distributions", Journal of
the Royal Statistical Society B 78, 2016, equation 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrolvm.controls import control
from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.models.base import LatentVariableModel
from pyrolvm.plates import data_plate

WEIGHT = "loss_weight"
"""The control that holds w."""
SITE = "loss"
"""The site of a loss that is given beside its program, and the mark of every loss in a trace."""


def loss(name: str, values: Tensor) -> None:
    """Update the belief by exp(-w values), inside a program; w = 1 unless `GeneralisedBayes` runs it.

    Parameters
    ----------
    name : str
        Of the site.
    values : Tensor [batch]
        The loss of each row, in the data plate; any number that is smaller where z suits the row better.
    """
    unit = dist.Unit(-values)
    marks: Any = {"is_auxiliary": True, SITE: True}
    pyro.sample(name, unit, obs=unit.sample(), infer=marks)


class Weighted(Messenger):
    """Make a loss of each observed site, weighed by `weight`: of a datum its -log p, of a `loss` itself."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        deterministic = msg["infer"].get("_deterministic")
        if not msg["is_observed"] or deterministic or isinstance(msg["fn"], _Subsample):
            return
        log_factor = self.weight * msg["fn"].log_prob(msg["value"])
        msg["fn"] = dist.Unit(log_factor)
        msg["value"] = msg["fn"].sample()
        msg["infer"] |= {"is_auxiliary": True, SITE: True}


class GeneralisedBayes(LatentVariableModel):
    """A program whose data enter as losses: exp(-w loss) p(z) in the place of p(x | z) p(z).

    Parameters
    ----------
    program : LatentVariableModel or callable
        Draws the latents. Its observed sites and its `loss` sites are the losses; -log p(x | z) of an observed site.
    loss : callable, optional
        `loss(z, *data)` -> [rows], for a program without such sites; z is what the program returns.
    weight : float
        w, in units of 1 / loss. `pyrolvm.calibrate_loss` finds it from the data. While training it is the control
        "loss_weight", which may have a schedule.
    guide : callable, optional
        Of a function; an AutoGuide is passed to `fit` instead.

    Raises
    ------
    SettingError
        Unless `weight` is a positive number.
    ProgramError
        While running: a program that observes nothing and has no loss, or has both.
    """

    def __init__(
        self,
        program: Any,
        loss: Callable[..., Tensor] | None = None,
        weight: float = 1.0,
        guide: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(weight, bool | str) or not 0 < weight < math.inf:
            raise SettingError(
                f"weight={weight!r} must be a positive number; weight=1 takes the loss as it is"
            )
        self.program, self.loss, self.weight = program, loss, float(weight)
        self._guide = guide
        self._known = program if isinstance(program, LatentVariableModel) else None

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """p(z) and the losses; the program's own arguments, and what it returns."""
        program = self.program if self._known is None else self._known.model
        with Weighted(control(WEIGHT, self.weight)), pyro.poutine.trace() as seen:
            result = program(*args, **kwargs)
            nodes: dict[str, Any] = seen.trace.nodes
            found = [name for name, site in nodes.items() if site.get("infer", {}).get(SITE)]
            if self.loss is not None and not found:
                self._declare(result, args, kwargs)
            elif self.loss is not None or not (found or _generates(args, kwargs)):
                raise ProgramError(_miscast(found))
        return result

    def _declare(self, z: Any, args: tuple, kwargs: dict) -> None:
        data = [*args, *kwargs.values()]
        if data and data[0] is not None:
            with data_plate(data[0]):
                loss(SITE, self.loss(z, *args, **kwargs))  # type: ignore[misc]

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """The guide of the program, or the one that was given."""
        guide = self._guide if self._guide is not None or self._known is None else self._known.guide
        if guide is None:
            raise ProgramError(
                "this program brings no guide: pass guide=... to fit, a function of the program's arguments or an "
                'AutoGuide such as "AutoNormal"'
            )
        return guide(*args, **kwargs)

    def controls(self) -> dict[str, float | Callable[[float], float]]:
        """`loss_weight`, and those of the program."""
        own = self._known.controls() if self._known is not None else {}
        return {**own, WEIGHT: self.weight}

    def check_data(self, x: Tensor) -> Tensor | None:
        """As the program's; finite, by default."""
        return super().check_data(x) if self._known is None else self._known.check_data(x)

    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """As the program's."""
        if self._known is not None:
            self._known.initialise_from(x, seed)

    def check_fit(self, x: Tensor) -> None:
        """As the program's."""
        if self._known is not None:
            self._known.check_fit(x)

    def decode(self, z: Tensor) -> Tensor | None:
        """As the program's."""
        return None if self._known is None else self._known.decode(z)


def _generates(args: tuple, kwargs: dict) -> bool:
    return not any(isinstance(a, Tensor) for a in (*args, *kwargs.values()))


def _miscast(found: list[str]) -> str:
    if found:
        return (
            f"loss= is for a program that only draws the latents, but this one observes '{found[0]}': leave loss out "
            "(its -log p is the loss), or take that site out"
        )
    return (
        "the program observes nothing and has no loss: pass loss=..., a function of what it returns and of the data, "
        'or write pyrolvm.loss("name", values) in its data plate'
    )
