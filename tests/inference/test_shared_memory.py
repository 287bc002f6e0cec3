"""Sums through shared memory, by threads in place of processes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyrolvm.inference.engine import memory


def together(count, what, times=1, patience=60_000):
    """What each of `count` threads finds by `what(rank, memory, place)`, in its last round of `times`."""
    slot = 4096
    shared = torch.zeros(count * (memory.LINE + 2 * slot), dtype=torch.uint8)

    def take_part(rank):
        place = torch.tensor([rank, count, slot, -1, patience])
        for _ in range(times):
            found = what(rank, shared, place)
        return found

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(take_part, range(count)))


def summed(values, times=1):
    """What each of `len(values)` threads finds as the sum of all `values`."""
    return together(len(values), lambda rank, *at: torch.ops.pyrolvm.shared_sum(values[rank], *at), times)


def in_order(values):
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("dtype", memory.TYPES)
@pytest.mark.parametrize("length", [1, 5, 511, 4096, 4097, 20_011])
def test_all_have_the_sum_in_the_order_of_the_ranks(count, dtype, length):
    generator = torch.Generator().manual_seed(length)
    values = [(100 * torch.randn(length, generator=generator)).to(dtype) for _ in range(count)]
    before = [value.clone() for value in values]
    for found in summed(values, times=5):
        assert torch.equal(found, in_order(values))  # the same bits
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


SHAPES = [(3, 5), (), (0, 4), (700,), (11, 13, 7)]


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("room", [0, 40])
def test_each_has_the_sum_of_its_share_and_gives_it_to_all(count, dtype, room):
    """Shares that lie across tensors, the last one with some room left; a slot holds a part of a share."""
    generator = torch.Generator().manual_seed(count)
    values = [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(count)]
    rests = [torch.randn(6, generator=generator).to(dtype) for _ in range(count)]
    flat = [torch.cat([value.reshape(-1) for value in own]) for own in values]
    length = -(-len(flat[0]) // count) + room
    operators = torch.ops.pyrolvm

    def scatter(rank, *at):
        return operators.shared_scatter(values[rank], rests[rank], 0.25, length, *at)

    found = together(count, scatter, times=5)
    total = torch.cat([in_order([0.25 * own for own in flat]), torch.zeros(count * length - len(flat[0]))])
    for rank, own in enumerate(found):
        assert torch.equal(own[:length], total[rank * length : (rank + 1) * length].to(dtype))
        assert torch.equal(own[length:], in_order(rests))

    def gather(rank, *at):
        return operators.shared_gather(values[rank], found[rank][:length], *at)

    def gather_into(rank, *at):
        operators.shared_gather_(into[rank], found[rank][:length], *at)

    into = [[torch.empty_like(value) for value in own] for own in values]
    made = together(count, gather, times=3)
    together(count, gather_into, times=3)
    for own in (*made, *into):
        assert [value.shape for value in own] == [value.shape for value in values[0]]
        assert torch.equal(torch.cat([value.reshape(-1) for value in own]), total[: len(flat[0])].to(dtype))


def test_the_memory_of_many_processes_fits_into_a_container():
    for count in (2, 3, 16, 64, 100):
        slot = memory.SharedMemory.slot(count)
        assert slot % 4096 == 0
        assert memory.SharedMemory.size(count) == count * (memory.LINE + 2 * slot) <= 2**26


def test_the_shape_stays():
    found = summed([torch.ones(3, 2, 4), torch.ones(3, 2, 4)])
    assert found[0].shape == (3, 2, 4)


def test_who_does_not_come_is_not_waited_for_without_end():
    shared = torch.zeros(2 * (memory.LINE + 2 * 4096), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="timed out"):
        torch.ops.pyrolvm.shared_sum(torch.ones(3), shared, torch.tensor([0, 2, 4096, -1, 50]))


def test_others_go_by_messages(monkeypatch, tmp_path):
    """Where there is no such memory, or no compiler."""
    monkeypatch.setattr(memory, "FOLDER", tmp_path / "none")
    assert memory._made(2) is None
    monkeypatch.setattr(memory, "FOLDER", tmp_path)
    _, name, token = memory._made(2)
    assert memory._opened(name, token) is not None
    assert memory._opened(name, b"x" * len(token)) is None
    assert memory._opened(name + "x", token) is None

    def fail():
        raise memory.native.CompilerError("none")

    monkeypatch.setattr(memory, "_path", fail)
    assert memory._made(2) is None
