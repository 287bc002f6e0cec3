"""The shuffle through windows: each row once a pass, from any step, and which rows can meet."""

import numpy as np
import pytest
import torch

from pyrolvm import DataError
from pyrolvm.data.far.windows import WindowPlan

SIZES = [30, 50, 10, 25, 40, 45]  # 200 rows
STARTS = np.concatenate([[0], np.cumsum(SIZES)])


def rows_of(plan, first, number):
    """The numbers of the rows [number, batch_size] that a plan's steps take, by what its windows hold."""
    found = []
    for step in range(first, first + number):
        places = plan.rows(step, 1)[0].numpy()
        held = {}
        for k in plan.windows(step, 1):
            numbers = [STARTS[b] + np.arange(i, j) for b, i, j in plan.contents(k)]
            held[k % 2] = np.concatenate(numbers)
            assert len(held[k % 2]) == plan.window
        found.append([held[p // plan.window][p % plan.window] for p in places])
    return np.array(found)


@pytest.mark.parametrize(("batch_size", "window"), [(10, 40), (7, 40), (20, 200), (13, 13), (10, 190)])
def test_each_row_is_visited_once_in_every_pass(batch_size, window):
    plan = WindowPlan(200, batch_size, 3, SIZES, window)
    steps = -(-600 // batch_size)
    stream = rows_of(plan, 0, steps).ravel()[:600].reshape(3, 200)
    if window % 200 == 0 or 200 % window == 0:
        assert all(sorted(one) == list(range(200)) for one in stream)
    assert np.bincount(stream.ravel(), minlength=200).sum() == 600
    # a window may hold the end of one pass and the beginning of the next, whose rows are mixed
    assert np.abs(np.bincount(stream.ravel(), minlength=200) - 3).max() <= 1


def test_a_plan_begins_at_any_step():
    plan = WindowPlan(200, 7, 3, SIZES, 40)
    whole = rows_of(plan, 0, 90)
    assert np.array_equal(rows_of(WindowPlan(200, 7, 3, SIZES, 40), 61, 9), whole[61:70])
    assert not np.array_equal(rows_of(WindowPlan(200, 7, 4, SIZES, 40), 0, 9), whole[:9])


def test_every_window_is_permuted_anew():
    plan = WindowPlan(200, 10, 3, SIZES, 40)
    first, third = plan.rows(0, 4), plan.rows(8, 4)  # in the same half of the buffer
    assert torch.equal(first.ravel().sort().values, third.ravel().sort().values)
    assert not torch.equal(first, third)


def test_steps_at_a_time_stay_in_a_window_or_cross_one_edge():
    plan, step = WindowPlan(200, 7, 0, SIZES, 40), 0
    while step < 200:
        size = plan.most_steps(step, 1000)
        windows = plan.windows(step, size)
        assert len(windows) == 1 or (size == 1 and len(windows) == 2)
        assert torch.equal(plan.rows(step, size), torch.cat([plan.rows(step + i, 1) for i in range(size)]))
        step += size


def test_rows_of_two_blocks_meet_in_the_share_of_passes_that_is_stated():
    """Of G = 40 blocks of 5 rows, H = 50 rows at a time: H / (G R) = 1/4 of the passes hold both in one window.

    Exactly: a window holds 10 whole blocks, so another block is among the 9 beside one with chance 9 / 39.
    """
    plan = WindowPlan(200, 10, 1, [5] * 40, 50)
    passes, together = 2000, 0
    for number in range(passes):
        blocks = [{b for b, _, _ in plan.contents(4 * number + k)} for k in range(4)]
        together += any({0, 1} <= held for held in blocks)
    chance = 9 / 39
    assert abs(together / passes - chance) < 4 * (chance * (1 - chance) / passes) ** 0.5


def test_every_place_of_a_batch_is_uniform_over_the_rows():
    """The estimate N / B sum is unbiased: over seeds, the mean row number of the first place is that of all rows."""
    first = [rows_of(WindowPlan(200, 10, seed, SIZES, 40), 0, 1)[0, 0] for seed in range(2000)]
    assert abs(np.mean(first) - 99.5) < 4 * np.std(np.arange(200)) / 2000**0.5


def test_a_window_smaller_than_a_batch_is_refused():
    with pytest.raises(DataError, match="a window of 5 rows is smaller than batch_size=10"):
        WindowPlan(200, 10, 0, SIZES, 5)
