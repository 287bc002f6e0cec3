"""Moving in the latent space of a fit: what the decoder makes of points between and around the codes of data.

All take a fit whose model has a decoder (`LatentVariableModel.decode`), and rows of data, which they encode. A model
with a condition (`ConditionalVAE`) takes the rows with theirs, (x, y) or a `Dataset` with labels; its pictures keep
the condition of the row that they start from.

Spherical paths: Shoemake 1985, "Animating rotation with quaternion curves"; for latent spaces White 2016, "Sampling
generative networks", section 2.1, with attribute vectors (2.2) and analogies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Normal

from pyrolvm.errors import DataError, ProgramError, SettingError, count, one_of
from pyrolvm.inference.posterior.fitted import FittedModel

KINDS = ("linear", "spherical")


def interpolate(
    fitted: FittedModel, x: Any, *, num: int = 9, kind: Literal["linear", "spherical"] = "linear"
) -> Tensor:
    """The way from each row to the next.

    Parameters
    ----------
    x : data [rows, ...]
        At least two rows.
    num : int
        Points on each way, its ends included.
    kind : {"linear", "spherical"}
        Along the line, or along the arc around the origin, where codes keep the length that the prior gives them.

    Returns
    -------
    Tensor [rows - 1, num, ...]
        The decoder's means; first and last of each way are the reconstructions of its ends.
    """
    one_of("kind", kind, KINDS)
    z, y = _codes(fitted, x, least=2)
    share = torch.linspace(0, 1, count("num", num, 2), dtype=z.dtype, device=z.device)[:, None]  # [num, 1]
    path = spherical if kind == "spherical" else torch.lerp
    ways = torch.stack([path(a, b, share) for a, b in itertools.pairwise(z)])
    return _decoded(fitted, ways, [v[:-1] for v in y])


def spherical(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Points [num, latent_dim] on the arc from a to b, [latent_dim] each; a line where they are parallel."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).clamp(-1, 1)
    angle = cosine.acos()
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, share)
    return ((1 - share) * angle).sin() / angle.sin() * a + (share * angle).sin() / angle.sin() * b


def traverse(
    fitted: FittedModel, x: Any, *, dims: Sequence[int] | None = None, num: int = 9, reach: float = 3.0
) -> Tensor:
    """One latent dimension moves, the others stay at the code of the first row.

    Parameters
    ----------
    x : data [rows, ...]
        Its first row is where the others stay.
    dims : sequence of int, optional
        The dimensions that move in turn, counted from 0; all by default.
    num : int
        Values of each, from -reach to reach.
    reach : float
        In the units of z: standard deviations of a normal prior.

    Returns
    -------
    Tensor [dims, num, ...]
        The decoder's means.
    """
    z, y = _codes(fitted, x)
    chosen = _dimensions(range(z.shape[-1]) if dims is None else dims, z.shape[-1])
    values = torch.linspace(-reach, reach, count("num", num, 2), dtype=z.dtype, device=z.device)
    moved = z[0].repeat(len(chosen), num, 1)
    for row, dim in enumerate(chosen):
        moved[row, :, dim] = values
    return _decoded(fitted, moved, [v[:1].expand(len(chosen), *v.shape[1:]) for v in y])


def latent_grid(fitted: FittedModel, x: Any, *, dims: Sequence[int] = (0, 1), num: int = 12) -> Tensor:
    """Two latent dimensions at evenly spaced quantiles of the standard normal, the others at 0.

    Parameters
    ----------
    x : data [rows, ...]
        Its first row has the condition of all pictures, where the model has one.
    dims : two ints
        The dimensions down and across.
    num : int
        Values of each.

    Returns
    -------
    Tensor [num, num, ...]
        The decoder's means; the first dimension falls down the picture, the second rises to the right.
    """
    z, y = _codes(fitted, x)
    down, across = _dimensions(dims, z.shape[-1], 2)
    share = (torch.arange(count("num", num, 2), dtype=z.dtype, device=z.device) + 0.5) / num
    values = Normal(z.new_zeros(()), 1.0).icdf(share)
    points = z.new_zeros(num, num, z.shape[-1])
    points[..., down], points[..., across] = values.flip(0)[:, None], values
    return _decoded(fitted, points, [v[:1].expand(num, *v.shape[1:]) for v in y])


def analogy(fitted: FittedModel, x: Any) -> Tensor:
    """a is to b as c is to d: d = c + (b - a), for each three rows.

    Parameters
    ----------
    x : data [3 n, ...]
        Rows a, b, c, a, b, c, ...

    Returns
    -------
    Tensor [n, 4, ...]
        The decoder's means at a, b, c and d; d has the condition of c.
    """
    z, y = _codes(fitted, x, least=3)
    if len(z) % 3:
        raise DataError(f"an analogy is of rows a, b, c: pass three rows (or six, ...), not {len(z)}")
    a, b, c = z.reshape(-1, 3, z.shape[-1]).unbind(1)
    pictures = [
        _decoded(fitted, point.unsqueeze(1), [v[k::3] for v in y])
        for point, k in ((a, 0), (b, 1), (c, 2), (c + b - a, 2))
    ]
    return torch.cat(pictures, 1)


def attribute_vector(fitted: FittedModel, x: Any, has: Any) -> Tensor:
    """The mean code of the rows that have an attribute minus that of the others, [latent_dim].

    Parameters
    ----------
    x : data [rows, ...]
    has : array_like of bool [rows]
    """
    z, _ = _codes(fitted, x)
    marked = torch.as_tensor(has, device=z.device).bool()
    if marked.shape != z.shape[:1] or not 0 < int(marked.sum()) < len(z):
        raise DataError(
            f"has must mark some rows and not all: booleans [{len(z)}], of which {int(marked.sum())} are true here"
        )
    return z[marked].mean(0) - z[~marked].mean(0)


def shift(
    fitted: FittedModel, x: Any, vector: Tensor, *, amounts: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0)
) -> Tensor:
    """Rows with more or less of an attribute.

    Parameters
    ----------
    x : data [rows, ...]
    vector : Tensor [latent_dim]
        A direction, as `attribute_vector` returns it.
    amounts : sequence of float
        Multiples of it that are added to the codes.

    Returns
    -------
    Tensor [rows, amounts, ...]
        The decoder's means.
    """
    z, y = _codes(fitted, x)
    steps = torch.as_tensor(amounts, dtype=z.dtype, device=z.device)[:, None]
    return _decoded(fitted, z[:, None] + steps * vector.to(z), y)


def recondition(fitted: FittedModel, x: Any, conditions: Any) -> Tensor:
    """The same z under other conditions: the style of each row with each label.

    Parameters
    ----------
    x : data [rows, ...]
        With the conditions that they have.
    conditions : array_like [num] or [num, condition_dim]
        Those to decode under.

    Returns
    -------
    Tensor [rows, num, ...]
        The decoder's means.

    Raises
    ------
    ProgramError
        The model takes no condition.
    """
    z, y = _codes(fitted, x)
    if not y:
        raise ProgramError("this model takes no condition that could be varied: fit a ConditionalVAE")
    others = torch.as_tensor(conditions, device=z.device)
    any_rows = fitted.batch(x).args[0][:1].expand(len(others), -1)
    checked: Any = fitted.batch((any_rows, others)).args[1]
    columns = [_decoded(fitted, z[:, None], [v.expand(len(z), *v.shape[1:])]) for v in checked.split(1)]
    return torch.cat(columns, 1)


def _codes(fitted: FittedModel, x: Any, least: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Codes [rows, latent_dim] and the conditions of the rows."""
    if not fitted.program.knows("decode"):
        raise ProgramError(
            "this model has no decoder to go through its latent space with: it must define decode(z), as VAE does"
        )
    batch = fitted.batch(x)
    if batch.num_rows < least:
        raise DataError(f"this takes {least} rows or more, not {batch.num_rows}")
    found = fitted.encode(batch)
    z = found if isinstance(found, Tensor) else next(iter(found.values()))
    if not z.is_floating_point():
        raise ProgramError(
            "the latents of this model are codes, whole numbers with nothing between them: decode other codes by "
            "fitted.model.decode(z)"
        )
    z = z.flatten(1) if z.dim() > 2 else z
    return z, [v for v in batch.args[1:] if isinstance(v, Tensor)]


@torch.no_grad()
def _decoded(fitted: FittedModel, z: Tensor, conditions: Sequence[Tensor]) -> Tensor:
    """The decoder's mean [rows, columns, ...] of z [rows, columns, latent_dim], with one condition for each row."""
    rows, columns = z.shape[:2]
    wide = [v.repeat_interleave(columns, 0) for v in conditions]
    event = fitted.structure.local_latents[0].event_shape
    shape = event if len(event) > 1 else (-1,)  # of several dimensions, `_codes` has made one
    with fitted.program.scope(mode="predict"):
        means = fitted.program.contract.decode(z.reshape(rows * columns, *shape), *wide)
    if means is None:
        raise ProgramError("this model has no decoder for these settings")
    return means.reshape(rows, columns, *means.shape[1:])


def _dimensions(dims: Sequence[int], latent_dim: int, number: int | None = None) -> list[int]:
    chosen = list(dims)
    if (number and len(chosen) != number) or not all(0 <= d < latent_dim for d in chosen):
        raise SettingError(
            f"dims={tuple(chosen)}: choose {number or 'any'} of the latent dimensions 0 to {latent_dim - 1}"
        )
    return chosen
