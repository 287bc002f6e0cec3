"""Where the guide puts each datum, and where the model puts it from there: means instead of draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.posterior import decoding
from pyrolvm.inference.posterior.generation import locations
from pyrolvm.inference.program.draws import tidy
from pyrolvm.inference.program.handlers import Means
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.seeds import Purpose, derived_seed

Values = Tensor | dict[str, Tensor]
Question = Callable[[Pair], dict[str, Tensor]]


def encoded(pair: Pair, seed: int) -> Values:
    """As `FittedModel.encode`."""
    names = {s.name for s in pair.structure.local_latents if s.in_guide}
    if not names and not pair.structure.enumerated:
        raise ProgramError("this program has no local latents in its guide, so there is nothing to encode")
    asked: Question = (lambda part: _codes(part, names)) if names else decoding.probabilities
    return _answered(independent(pair), asked, seed)


def most_probable(pair: Pair) -> Values:
    """As `FittedModel.most_probable`."""
    if not pair.structure.enumerated:
        raise ProgramError(
            "this program sums out no latents, so there is no most probable path: ask encode(x) or posterior(x)"
        )
    return _answered(independent(pair), decoding.most_probable, 0)


def reconstructed(pair: Pair, seed: int) -> Values:
    """As `FittedModel.reconstruct`."""
    return _answered(
        pair.chunks(), lambda part: locations(part, part.model(None, Means(), given=part.means())), seed
    )


def one_or_all(values: dict[str, Tensor]) -> Values:
    """The only tensor, or all of them by name."""
    return next(iter(values.values())) if len(values) == 1 else values


def independent(pair: Pair, num_samples: int = 1) -> Iterator[Pair]:
    """Some rows at a time; all at once where a latent that is summed out is shared by them."""
    enumerated = pair.structure.enumerated
    if all(s.local for s in enumerated):
        yield from pair.chunks(per_row=num_samples * max(1, sum(s.num_states for s in enumerated)))
    else:
        yield pair


def _answered(parts: Iterator[Pair], question: Question, seed: int) -> Values:
    """The answers of all parts, joined by rows, each part with noise of its own.

    Of programs that take their data whole there is one part, which may have no rows.
    """
    found = []
    for i, part in enumerate(parts):
        with seeded(derived_seed(seed, Purpose.MEANS, i), part.device):
            found.append(question(part))
    whole = found[0] if len(found) == 1 else {n: torch.cat([f[n] for f in found]) for n in found[0]}
    return one_or_all(whole)


def _codes(pair: Pair, names: set[str]) -> dict[str, Tensor]:
    """The values of the guide's sites at its means; probabilities where they are discrete."""
    found = {}
    for site in (s for s in sample_sites(pair.guide(None, Means())) if s["name"] in names):
        probs = getattr(site["fn"], "probs", None)
        discrete = getattr(site["fn"], "has_enumerate_support", False)
        value = probs if discrete and probs is not None else site["value"]
        event_dims = value.dim() - len(site["fn"].batch_shape)
        found[site["name"]] = tidy(pair.structure, site, value, event_dims)[0]
    return found
