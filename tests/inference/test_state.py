"""The training state's copies, and whether it is finite."""

import pytest
import torch

from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.training.loop import _finite


def state(**parameters):
    slots = {name: {"step": torch.tensor(3.0), "exp_avg": value + 1} for name, value in parameters.items()}
    return TrainingState(parameters, slots, 3, {"cpu": torch.get_rng_state()})


def equal(one, two):
    a, b = one.flatten(), two.flatten()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_copy_takes_the_memory_of_one_that_nobody_needs():
    here = state(a=torch.randn(3, 2), b=torch.randn(4))
    spare = state(a=torch.zeros(3, 2), b=torch.zeros(5), c=torch.zeros(1))
    copy = here.clone(spare)
    assert equal(copy, here)
    assert copy.parameters["a"] is spare.parameters["a"]
    assert copy.optimizer["a"]["exp_avg"] is spare.optimizer["a"]["exp_avg"]
    assert copy.parameters["b"] is not spare.parameters["b"]  # of another shape
    before = here.clone()
    for value in (*copy.parameters.values(), copy.optimizer["b"]["exp_avg"]):
        value.zero_()
    assert equal(here, before)
    assert equal(
        state(a=torch.ones(2).double()).clone(state(a=torch.zeros(2))), state(a=torch.ones(2).double())
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(value):
    terms = torch.zeros(2, 3)
    before = state(a=torch.zeros(1))
    assert _finite(state(a=torch.full((4,), 3e38)), terms, before)  # though their sum is not
    assert not _finite(state(a=torch.tensor([0.0, value, 1.0])), terms, state(a=torch.zeros(3)))
    assert not _finite(state(a=torch.tensor([value, -value])), terms, state(a=torch.zeros(2)))
    terms[0, 1] = value
    assert _finite(state(a=torch.zeros(1)), terms, before)  # a term may be unknown
    terms[1, 0] = value
    assert not _finite(state(a=torch.zeros(1)), terms, before)


def test_what_was_infinite_before_may_stay_so():
    """A positive parameter at 0 is at -inf without its constraint."""
    here = state(a=torch.tensor([-float("inf"), 1.0]))
    assert here.not_finite(here.clone()) is None
    assert here.not_finite(state(a=torch.tensor([0.0, 1.0]))) == "a"
    assert here.not_finite(state(a=torch.tensor([float("inf"), 1.0]))) == "a"
    nan = state(a=torch.tensor([float("nan"), 1.0]))
    assert nan.not_finite(nan.clone()) == "a"
