"""Programs of Pyro's users run unmodified: the bounds of `SVI`, the same numbers compiled, an answer to every question.

The fast part; `make corpus` runs all of it and writes the table.
"""

import pytest

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
