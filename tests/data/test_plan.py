"""The batch plan: a pure function of seed and step that visits every row once per epoch."""

import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyrolvm.data import BatchPlan
from pyrolvm.errors import DataError, SettingError


@st.composite
def plans(draw):
    num_rows = draw(st.integers(1, 300))
    return BatchPlan(num_rows, draw(st.integers(1, num_rows)), draw(st.integers(0, 2**70)))


@given(plans(), st.integers(1, 4))
def test_every_epoch_visits_every_row_once(plan, num_epochs):
    stream = plan.rows(0, plan.num_steps(num_epochs)).reshape(-1)[: num_epochs * plan.num_rows]
    for epoch in stream.reshape(num_epochs, plan.num_rows):
        assert torch.equal(epoch.sort().values, torch.arange(plan.num_rows))


@given(plans(), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_chunks_end_to_end_are_the_whole(plan, first, a, b):
    whole = plan.rows(first, a + b)
    assert whole.shape == (a + b, plan.rows_per_step)
    assert whole.dtype == torch.int64
    assert torch.equal(torch.cat([plan.rows(first, a), plan.rows(first + a, b)]), whole)


@given(plans(), st.integers(0, 500))
def test_a_fresh_plan_resumes_at_any_step(plan, step):
    plan.rows(0, 30)
    fresh = BatchPlan(plan.num_rows, plan.batch_size, plan.seed)
    assert torch.equal(fresh.rows(step, 3), plan.rows(step, 3))
    assert fresh == plan


def test_going_back_after_the_cache_was_left():
    plan = BatchPlan(2**14 + 1, 1000, seed=5)
    start = plan.rows(0, 4).clone()
    plan.rows(10_000, 40)
    assert torch.equal(plan.rows(0, 4), start)
    assert len(plan._blocks) <= 2


def test_what_is_returned_can_be_written_to_without_changing_the_plan():
    plan = BatchPlan(10, 5)
    before = plan.rows(0, 2).clone()
    plan.rows(0, 2).zero_()
    assert torch.equal(plan.rows(0, 2), before)


def test_the_same_in_another_process_whatever_the_global_seeds():
    torch.manual_seed(1)
    here = BatchPlan(50, 8, seed=3).rows(7, 2).tolist()
    code = "from pyrolvm.data import BatchPlan; print(BatchPlan(50, 8, seed=3).rows(7, 2).tolist())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


def test_drawing_leaves_torchs_global_generator_alone():
    state = torch.random.get_rng_state()
    BatchPlan(50, 8).rows(0, 100)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_seeds_and_epochs_differ():
    a, b = BatchPlan(100, 100, 0).rows(0, 2), BatchPlan(100, 100, 1).rows(0, 2)
    assert not torch.equal(a, b)
    assert not torch.equal(a[0], a[1])


def test_each_place_of_a_batch_is_uniform_over_the_rows():
    # 7 does not divide by 3: batches straddle epochs, and N/B * sum must stay unbiased
    rows = BatchPlan(7, 3, seed=11).rows(0, 70_000)
    for place in range(3):
        counts = torch.bincount(rows[:, place], minlength=7).double()
        error = (counts - 10_000).abs() / (70_000 * (1 / 7) * (6 / 7)) ** 0.5
        assert error.max() < 4


def test_all_rows_in_order_without_a_copy():
    rows = BatchPlan(1000).rows(5, 10**6)
    assert rows.shape == (10**6, 1000)
    assert rows.stride(0) == 0
    assert torch.equal(rows[17], torch.arange(1000))
    assert BatchPlan(1000).num_steps(3) == 3


def test_ten_million_rows_cost_one_permutation():
    plan = BatchPlan(10**7, 10, seed=0)
    first = plan.rows(0, 1)
    block = plan._blocks[0]
    plan.rows(1, 1000)
    assert plan._blocks[0] is block
    assert torch.equal(first[0], block[:10])


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "epochs", "steps"), [(10, 5, 2, 4), (10, 3, 1, 4), (10, 3, 3, 10)]
)
def test_num_steps_is_the_least_that_covers_the_epochs(num_rows, batch_size, epochs, steps):
    assert BatchPlan(num_rows, batch_size).num_steps(epochs) == steps


def test_pickles():
    plan = BatchPlan(10, 3, 1)
    assert torch.equal(pickle.loads(pickle.dumps(plan)).rows(0, 9), plan.rows(0, 9))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 11), DataError, "batch_size=11 is larger than the data's 10 rows"),
        ((0, None), DataError, "at least one row"),
        ((10, 0), SettingError, "batch_size must be a positive whole number, not 0"),
        ((10, 2.5), SettingError, "batch_size must be a positive whole number, not 2.5"),
        ((10, True), SettingError, "must be a positive whole number, not True"),
        ((10, 2, -1), SettingError, "seed must be a whole number of at least 0, not -1"),
        ((10, 2, 0.5), SettingError, "seed must be .* not 0.5"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchPlan(*arguments)


def test_negative_steps_are_refused():
    with pytest.raises(SettingError, match="cannot be negative"):
        BatchPlan(10, 2).rows(-1, 2)
