"""Where a fit begins: the modes of the log joint, or the best of several Pathfinder paths where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pyrolvm.errors import DivergenceError, PyrolvmError
from pyrolvm.inference.log_joint.families import KINDS, POINT, Family, Gaussian, guide_of
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.modes import Place, find_modes
from pyrolvm.inference.log_joint.pathfinder import find_paths
from pyrolvm.inference.program.pair import Pair
from pyrolvm.seeds import Purpose, derived_seed

RELABELLED = 1e-3
"""Relative difference of sorted values below which two modes hold the same ones in another order."""


@dataclass(frozen=True)
class Start:
    """Where to begin, in the unconstrained space of all latents together.

    Attributes
    ----------
    log_joint : LogJoint
    places : list of Place
        The modes, best first; without one, the best Pathfinder normal.
    modes : int
        Distinct modes that four starts found.
    relabelled : bool
        Whether all modes have the same values in another order.
    sentence : str
    """

    log_joint: LogJoint
    places: list[Place]
    modes: int
    relabelled: bool
    sentence: str

    @torch.no_grad()
    def place(self, pair: Pair) -> None:
        """Set the guide's location and scale from the best place; its parameters change in place."""
        family = Family(pair.program, self.log_joint)
        best = self.places[0]
        family.write(Gaussian.around(best.location, best.scale_tril, family.kind, family.rank))


def _kind(guide: Any) -> str:
    """What a guide is called: its class, or a function of the user's own by its name."""
    named = getattr(guide, "__self__", guide)
    return getattr(named, "__name__", type(named).__name__)


def declined(pair: Pair) -> str | None:
    """Why the pair cannot be fitted on fixed draws, in one sentence; None if it can.

    The program is not run: a density without derivatives is found by `find_start`, as a `ProgramError`.
    """
    structure, program = pair.structure, pair.program
    guide = guide_of(program)
    if type(guide) not in KINDS:
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        return f"fixed draws need a Gaussian AutoGuide ({kinds}), not {_kind(guide)}"
    own = {id(p) for p in guide.parameters()}
    learned = [name for name, p in program.parameters.items() if id(p) not in own]
    if learned:
        return f"the model learns parameters of its own ('{learned[0]}'), and fixed draws fit a guide alone"
    for site in structure.latents:
        if site.left_to_prior:
            return f"the guide leaves '{site.name}' to the prior"
        if site.masked and not (site.enumerated and not site.in_guide):
            return f"a mask leaves entries of '{site.name}' out, so that no mode has them"
        if site.bound:
            return f"'{site.name}' has no density but an estimate of a bound"
        if site.discrete and not (site.enumerated and not site.in_guide):
            return f"'{site.name}' is discrete and not summed out: mark it infer={{'enumerate': 'parallel'}}"
    if pair.device.type != "cpu":
        return "fixed draws are fitted on the CPU: device='cpu'"
    return None


def find_start(pair: Pair, seed: int = 0) -> Start:
    """Modes of the log joint from four starts; the best of eight Pathfinder paths where there is none.

    Raises
    ------
    ProgramError
        The log joint has no derivatives, or is not the same twice.
    DivergenceError
        It is finite at no start.
    """
    seed = derived_seed(seed, Purpose.START, 4) % 2**31
    # the maximum of an AutoDelta's bound is a mode in the latents' own space
    log_joint = LogJoint(pair, jacobian=not _is_point_of_own_space(pair))
    modes = find_modes(log_joint, seed)
    if modes:
        relabelled = len(modes) > 1 and all(_relabelled(log_joint, modes[0], m) for m in modes[1:])
        return Start(log_joint, modes, len(modes), relabelled, _modes_sentence(len(modes), relabelled))
    paths = find_paths(log_joint, seed)
    if not paths:
        raise DivergenceError(
            "the log joint has no mode, and no finite bound along eight quasi-Newton paths from starts in [-2, 2] of "
            "unconstrained space: standardise the data, or narrow the priors"
        )
    sentence = "the log joint has no mode, so the start is the best of eight quasi-Newton paths (Pathfinder)"
    return Start(log_joint, [paths[0].place(log_joint)], 0, False, sentence)


def declined_or_start(pair: Pair, seed: int = 0) -> Start | str:
    """A start, or the sentence why there is none."""
    reason = declined(pair)
    if reason is not None:
        return reason
    try:
        return find_start(pair, seed)
    except PyrolvmError as error:
        return str(error)


def _is_point_of_own_space(pair: Pair) -> bool:
    guide = guide_of(pair.program)
    return KINDS.get(type(guide)) == POINT and type(guide).__name__ == "AutoDelta"


def _relabelled(log_joint: LogJoint, place: Place, other: Place) -> bool:
    one, two = (torch.sort(log_joint.scalars(p.location)[0]).values for p in (place, other))
    return torch.allclose(one, two, rtol=RELABELLED, atol=RELABELLED * float(one.abs().max()))


def _modes_sentence(count: int, relabelled: bool) -> str:
    if count == 1:
        return "four starts led to one mode"
    kind = "the same values under other labels" if relabelled else "different answers"
    return f"four starts led to {count} modes, {kind}"
