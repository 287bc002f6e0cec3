"""Latents in unconstrained coordinates: z = T(u), T = `biject_to(support)`."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyrolvm.errors import SettingError


def bijection(site: Any) -> Any:
    """T from the real numbers to a site's support; a mixture has that of its components.

    Raises
    ------
    SettingError
        torch has no such map for the support.
    """
    support = site["fn"].support
    try:
        return biject_to(getattr(support, "base_constraint", None) if _mixed(support) else support)
    except NotImplementedError:
        raise SettingError(
            f"latents are moved along gradients here, but no map from real numbers to the support of "
            f"'{site['name']}' ({support}) is known: of log_evidence, use method='importance'; of fit, optimizer='adam'"
        ) from None


def _mixed(support: Any) -> bool:
    return type(support).__name__ == "MixtureSameFamilyConstraint"


class Unconstrained(Messenger):
    """Set sites to T(u), and record log |T'(u)| of each."""

    def __init__(self, u: dict[str, Tensor]) -> None:
        super().__init__()
        self.u = u
        self.values: dict[str, Tensor] = {}
        self.log_abs_det: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.u and not msg["is_observed"]:
            T = bijection(msg)
            self.values[name] = T(self.u[name])
            self.log_abs_det[name] = T.log_abs_det_jacobian(self.u[name], self.values[name])
            msg["value"], msg["done"] = self.values[name], True
