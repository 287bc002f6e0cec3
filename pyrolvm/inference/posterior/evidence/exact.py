"""log p(x) without Monte Carlo error: the model's own closed form, or a sum over its discrete latents."""

from __future__ import annotations

from collections.abc import Iterator

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.evidence.chunks import evidence_chunks
from pyrolvm.inference.posterior.evidence.enumeration import enumerable, summed_out
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import refuse_bound, sample_sites
from pyrolvm.seeds import Purpose, derived_seed


def exact_evidence(pair: Pair, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield log_evidence [rows], in nats, of some rows at a time.

    By the model's `log_marginal` if it has one. Otherwise every latent inside the data plate must be discrete with
    finitely many values, and those outside it point masses in the guide.

    Raises
    ------
    SettingError
        Neither is the case.
    """
    program = pair.program
    for index, (part, _) in enumerate(evidence_chunks(pair, 1)):
        with seeded(derived_seed(seed, Purpose.EVIDENCE, index), pair.device):
            found = _closed_form(part) if program.knows("log_marginal") else None
            found = _enumerated(part) if found is None else found
        yield {"log_evidence": found}


def _closed_form(pair: Pair) -> Tensor | None:
    with pair.program.scope(pair.batch, pair.mode):
        return pair.program.contract.log_marginal(*pair.batch.args, **pair.batch.kwargs)


def _enumerated(pair: Pair) -> Tensor:
    refuse_bound(pair.structure, "method='exact'")
    guide = pair.guide() if pair.structure.global_latents else Trace()
    held = pair.held(guide)
    _check_points(guide, held)
    for site in sample_sites(pair.model(given=held)):
        if site["name"] not in held and not site["is_observed"] and not enumerable(site["fn"]):
            owner = pair.program.owner
            name = getattr(owner, "__name__", type(owner).__name__)
            other = "prior" if pair.structure.points else "importance"
            raise SettingError(
                f"{name} has no exact log p(x) (no method `log_marginal`, and '{site['name']}' has too many values "
                f"to sum over): use method='{other}' with num_samples=1000 or more"
            )
    return summed_out(pair, None, {}, held)[0]


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
