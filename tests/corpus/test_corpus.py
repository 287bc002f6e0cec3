"""Programs of Pyro's users run unmodified: the bounds of `SVI`, the same numbers compiled, an answer to every question.

The fast part; `make corpus` runs all of it and writes the table.
"""

import inspect

import pytest
from pyro.infer import autoguide

from corpus import asked
from corpus.form import load_all

CASES = load_all()
QUICK = [name for name, case in CASES.items() if case.quick]
RUNNING = [name for name in QUICK if not CASES[name].refused]
COMPILED = [name for name, case in CASES.items() if case.quick_compiled]


@pytest.mark.filterwarnings("ignore")  # a user's program may warn
@pytest.mark.parametrize("name", QUICK)
def test_fit_has_the_bounds_of_svi(name):
    assert not asked.disagreement(CASES[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNNING)
def test_every_question_is_answered_or_declined(name):
    assert not asked.faults(CASES[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_engine_has_the_same_bounds(name):
    wrong, _ = asked.parted(CASES[name])
    assert not wrong


def kinds(guide):
    """The names of the automatic guides that a guide is made of."""
    parts = guide if isinstance(guide, autoguide.AutoGuideList) else ()
    return {guide if isinstance(guide, str) else type(guide).__name__}.union(*map(kinds, parts))


def test_every_automatic_guide_of_pyro_is_among_them():
    bases = ("AutoGuide", "AutoContinuous", "AutoMessenger")
    known = {n for n in autoguide.__all__ if inspect.isclass(getattr(autoguide, n)) and n not in bases}
    assert known <= set().union(*(kinds(case.build().guide) for case in CASES.values()))
