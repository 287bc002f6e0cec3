"""log p(x) without Monte Carlo error: the model's own closed form, or a sum over its discrete latents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.evidence.enumeration import enumerable, summed_out
from pyrolvm.inference.posterior.evidence.runs import Run, chunks
from pyrolvm.inference.program.handlers import Fixed
from pyrolvm.inference.program.structure import sample_sites

if TYPE_CHECKING:
    from pyrolvm.inference.posterior.fitted import FittedModel


def exact_evidence(fitted: FittedModel, x: Any, seed: int) -> Iterator[dict[str, Tensor]]:
    """For some rows at a time: log_evidence [rows], nats. Raises `SettingError` if it is not known.

    A model's `log_marginal` if it has one. Else every latent inside the data plate must be discrete with
    finitely many values, and those outside it point masses in the guide.
    """
    log_marginal = getattr(fitted.program.owner, "log_marginal", None)
    for run, _ in chunks(fitted, x, 1, seed):
        if log_marginal is not None:
            yield {"log_evidence": log_marginal(*run.batch.args, **run.batch.kwargs)}
        else:
            yield {"log_evidence": _enumerated(run, fitted.program.owner)}


def _enumerated(run: Run, owner: Any) -> Tensor:
    guide = run.guide(None) if run.structure.global_latents else Trace()
    held = run.held(guide)
    _check_points(guide, held)
    for site in sample_sites(run.model(None, Fixed(held))):
        if site["name"] not in held and not site["is_observed"] and not enumerable(site["fn"]):
            name = getattr(owner, "__name__", type(owner).__name__)
            raise SettingError(
                f"{name} has no exact log p(x) (no method `log_marginal`, and '{site['name']}' has too many values "
                "to sum over): use method='importance' with num_samples=1000 or more"
            )
    return summed_out(run, None, Fixed(held), held)[0]


def _check_points(guide: Trace, held: dict[str, Tensor]) -> None:
    for site in sample_sites(guide):
        fn = site["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if site["name"] in held and type(fn).__name__ != "Delta":
            raise SettingError(
                f"log p(x) is exact only at a point of '{site['name']}', which has a posterior: "
                "use method='importance', which averages over it"
            )
