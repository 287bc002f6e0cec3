"""Where a sequence repeats itself: the operations of loops that were unrolled.

First the periods of what follows itself (`_periods`), then what the parts so found have in common (`_shared`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Part = tuple[int, int]

LEAST_SAVED = 24
"""Elements that a repetition must save."""
LONGEST = 4000
"""The longest period that is looked for."""
SHARED = range(6, 120)
"""Lengths of what is looked for in several parts."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


def repeats(sequence: Sequence[int]) -> list[Part]:
    """The sequence cut into parts (start, end), of which many are equal."""
    values = np.asarray(sequence, dtype=np.int64)
    parts = _periods(values)
    contents = [tuple(values[start:end].tolist()) for start, end in parts]
    kinds = list(dict.fromkeys(contents))
    cuts = dict(zip(kinds, _shared(kinds), strict=True))
    return [
        (start + a, start + b)
        for (start, _), content in zip(parts, contents, strict=True)
        for a, b in cuts[content]
    ]


def _periods(values: np.ndarray) -> list[Part]:
    """The parts of the repetition that saves most, and so on before and after it."""
    found: list[Part] = []
    waiting = [(0, len(values))]
    while waiting:
        start, end = waiting.pop()
        best = _best_period(values[start:end])
        if best is None:
            found += [(start, end)] if start < end else []
            continue
        first, period, count = best
        middle, last = start + first, start + first + period * count
        found += [(middle + k * period, middle + (k + 1) * period) for k in range(count)]
        waiting += [(start, middle), (last, end)]
    return sorted(found)


def _best_period(values: np.ndarray) -> tuple[int, int, int] | None:
    """(start, period, count) of the repetition that saves most; the shortest period of equal ones."""
    best, saved = None, LEAST_SAVED - 1
    for period in range(1, min(LONGEST, len(values) // 2) + 1):
        same = np.zeros(len(values) - period + 2, dtype=np.int8)
        same[1:-1] = values[:-period] == values[period:]
        edges = np.flatnonzero(np.diff(same))
        if not len(edges):
            continue
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        counts = lengths // period + 1
        gains = period * (counts - 1)
        at = int(gains.argmax())
        if gains[at] > saved:
            best, saved = (int(starts[at]), period, int(counts[at])), int(gains[at])
    return best


def _shared(parts: Sequence[Sequence[int]]) -> list[list[Part]]:
    """Each part cut where it contains what others, or itself elsewhere, contain as well."""
    lengths = [len(part) for part in parts]
    begins = np.cumsum([0, *(n + 1 for n in lengths)])
    values = np.arange(-1, -1 - begins[-1], -1)  # no two negative numbers are equal: marks between parts
    for begin, part in zip(begins, parts, strict=False):
        values[begin : begin + len(part)] = part
    cuts: set[int] = set()
    while (best := _best_shared(values)) is not None:
        length, places = best
        for place in places:
            cuts |= {place, place + length}
            values[place : place + length] = -np.arange(place, place + length) - len(values) - 1
    return [
        _between([c - begin for c in cuts if begin <= c <= begin + n], n)
        for begin, n in zip(begins.tolist(), lengths, strict=False)
    ]


def _between(cuts: list[int], length: int) -> list[Part]:
    ends = sorted({0, *cuts, length})
    return list(pairwise(ends))


def _best_shared(values: np.ndarray) -> tuple[int, list[int]] | None:
    """(length, places) of the stretch whose repetition saves most."""
    best, saved = None, LEAST_SAVED - 1
    with np.errstate(over="ignore"):
        sums = np.zeros(len(values), dtype=np.uint64)
        for length in range(1, min(SHARED.stop, len(values) // 2)):
            sums = sums[: len(values) - length + 1] * _BASE + values[length - 1 :].astype(np.uint64)
            if length not in SHARED:
                continue
            _, inverse, counts = np.unique(sums, return_inverse=True, return_counts=True)
            if length * (int(counts.max()) - 1) <= saved:
                continue
            places = _apart(np.flatnonzero(inverse == counts.argmax()).tolist(), length)
            if length * (len(places) - 1) > saved:
                best, saved = (length, places), length * (len(places) - 1)
    return best


def _apart(places: list[int], length: int) -> list[int]:
    """The places without those that overlap an earlier one."""
    kept: list[int] = []
    for place in places:
        if not kept or place >= kept[-1] + length:
            kept.append(place)
    return kept
