"""What the measures have in common: streams of noise, draws in parts, and the sentences that they answer in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Any, ClassVar

import pandas as pd
import torch

from pyrolvm.errors import ProgramError
from pyrolvm.inference.posterior.evidence import khat_threshold
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Site, Structure, refuse_bound
from pyrolvm.seeds import Purpose, derived_seed


class Measure(IntEnum):
    """The streams of noise of the measures, so that no two share a draw. New ones go to the end."""

    LOCAL_KHAT = 0
    SHARED_KHAT = 1
    EVIDENCE = 2
    COLLAPSE = 3
    GAPS = 4
    PREDICTIVE = 5
    REFERENCE = 6
    CALIBRATION = 7
    RESTARTS = 8
    ROWS = 9
    GRADIENTS = 10
    EXPORT = 11


def measure_seed(seed: int, measure: Measure, *index: int) -> int:
    """The seed of one measure, or of one part of it (a chunk, a chain, a data set)."""
    return derived_seed(seed, Purpose.DIAGNOSE, measure, *index)


def noise(pair: Pair, seed: int, measure: Measure, *index: int) -> AbstractContextManager[None]:
    """Generators of one part of a measure within the block; the caller's are left as found."""
    return seeded(measure_seed(seed, measure, *index), pair.device)


class Report:
    """The result of a measure: findings in sentences, and the table that `shows` names, which `str` adds to them."""

    shows: ClassVar[str] = ""

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        raise NotImplementedError

    @property
    def sentence(self) -> str:
        """The findings in plain words, as one text."""
        return " ".join(self.sentences)

    @property
    def shown(self) -> str:
        """The table below the sentences, forty lines of it at most; empty if there is none."""
        table = getattr(self, self.shows, None)
        return "" if table is None else table.to_string(float_format="{:z.3f}".format, max_rows=40)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.sentence}"

    def __str__(self) -> str:
        return "\n".join(part for part in (self.sentence, self.shown) if part)


class KhatReport(Report):
    """A report in which k-hat of `num_samples` draws is judged."""

    num_samples: int

    @property
    def threshold(self) -> float:
        """min(1 - 1 / log10 num_samples, 0.7): k-hat should be at most this."""
        return khat_threshold(self.num_samples)


def local_sites(structure: Structure, what: str, *, summed_out: bool = False) -> list[Site]:
    """The local latents that the guide draws.

    Raises
    ------
    ProgramError
        There are none, or one is held at a point, or the guide draws those of all data at once; or one is summed out,
        unless `what` can be computed beside such latents.
    """
    sites = [s for s in structure.local_latents if s.in_guide or not s.enumerated]
    summed = [s.name for s in structure.latents if s.enumerated and not s.in_guide]
    points = [s.name for s in sites if s.point]
    if summed and not (sites and summed_out):
        raise ProgramError(
            f"{what} needs draws of every latent, but '{summed[0]}' is enumerated: give the guide a site for it"
        )
    if structure.joint_guide:
        raise ProgramError(
            f"the guide draws the latents of all data at once ('{structure.joint_guide}'), so {what} per "
            "datum has no meaning: use a guide that is independent over data, such as AutoNormal"
        )
    if not sites:
        raise ProgramError(
            f"{what} is about latents of each datum and this program has none in its data plate"
        )
    refuse_bound(structure, what)
    if points:
        raise ProgramError(
            f"{what} needs a distribution, but the guide is a point estimate: it holds '{points[0]}' at one value per "
            "datum"
        )
    return sites


def table_of(columns: Mapping[str, Any], site: str | None = None, element: str = "element") -> pd.DataFrame:
    """Columns of tensors on any device as a table, whose rows are the elements of `site` if there is one."""
    table = pd.DataFrame({k: v.cpu().numpy() if torch.is_tensor(v) else v for k, v in columns.items()})
    if site is not None:
        table.index = pd.MultiIndex.from_product([[site], range(len(table))], names=["site", element])
    return table


def compared(values: list[float], limit: float) -> tuple[list[str], str]:
    """Numbers and the limit they are compared with, to as many decimals as tell each from it: two at least."""
    decimals = 2
    while decimals < 6 and any(f"{v:.{decimals}f}" == f"{limit:.{decimals}f}" != v for v in values):
        decimals += 1
    return [f"{v:z.{decimals}f}" for v in values], f"{limit:.{decimals}f}"
