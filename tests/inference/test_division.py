"""How the optimiser's work is divided among processes, and what becomes of it in a compiled step."""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from pyrolvm.inference.engine import inductor, rewrites, updating
from pyrolvm.inference.engine.division import LINE, SHARE, Division
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.engine.updating import division
from pyrolvm.processes import Processes

SHAPES = {"weight": torch.Size([7, 9]), "scale": torch.Size([]), "bias": torch.Size([50])}


@dataclass
class Others:
    """Memory in which the shares of all processes are known."""

    shares: list

    def gather_into(self, into, share):
        whole = torch.cat(self.shares)
        torch._foreach_copy_(
            into, [p.reshape(t.shape) for p, t in zip(self.parts(whole, into), into, strict=True)]
        )

    @staticmethod
    def parts(whole, into):
        sizes = [t.numel() for t in into]
        return whole[: sum(sizes)].split(sizes)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_taken_and_given(count):
    """Moments that belong to entries, and a count of steps that belongs to all."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    slots = {
        name: {"step": torch.tensor(3.0), "exp_avg": torch.randn(shape, generator=generator)}
        for name, shape in SHAPES.items()
    }
    each = [Division(Processes(rank, count), SHAPES, ("exp_avg",)) for rank in range(count)]
    taken = [own.take(parameters, slots) for own in each]
    flat = torch.cat([value.reshape(-1) for value in parameters.values()])
    whole = torch.cat([own[f"parameters/{SHARE}"] for own in taken])
    assert len(whole) == count * each[0].length
    assert each[0].length % LINE == 0
    assert torch.equal(whole[: len(flat)], flat)
    assert whole[len(flat) :].eq(0).all()
    others = Others([own[f"optimizer/exp_avg/{SHARE}"] for own in taken])
    last = replace(each[-1], processes=Processes(count - 1, count, memory=others))
    own = {slot: taken[-1][f"optimizer/{slot}/{SHARE}"] for slot in ("step", "exp_avg")}
    given = last.blank(own)
    last.give(own, given)
    for name in SHAPES:
        assert all(torch.equal(given[name][slot], slots[name][slot]) for slot in ("step", "exp_avg"))


@pytest.fixture(autouse=True)
def least(monkeypatch):
    monkeypatch.setattr(updating, "LEAST", 95)


def problem(optimizer="adam", size=100, dtype=torch.float32, moved=torch.float32, tables=()):
    parameters = {"many": torch.zeros(size, dtype=dtype), "still": torch.zeros(2), "rows": torch.zeros(3)}
    program = SimpleNamespace(
        parameters=parameters, buffers={"mean": torch.zeros(2, dtype=moved)}, dtype=torch.float32
    )
    sharing = SimpleNamespace(
        processes=Processes(0, 2, memory=Others([])), trained=(True, False, True), moved=("mean",)
    )
    return SimpleNamespace(
        program=program, sharing=sharing, optimizer=OptimizerSpec(optimizer), tables=tables
    )


def test_what_is_divided():
    slots = {
        name: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p)}
        for name, p in problem().program.parameters.items()
    }
    found = division(problem(), slots)
    assert list(found.shapes) == ["many", "rows"]
    assert found.slots == ("exp_avg",)
    assert list(division(problem(tables=("rows",)), slots).shapes) == ["many"]
    assert list(division(problem(torch.optim.SGD), {}).shapes) == ["many", "rows"]


class Own(torch.optim.SGD):
    """An optimiser of which nobody knows what it does."""


@pytest.mark.parametrize(
    "options",
    [{"optimizer": Own}, {"size": 90}, {"dtype": torch.float64}, {"moved": torch.float64}],
)
def test_what_is_not_divided(options):
    assert division(problem(**options), {}) is None


def test_only_processes_of_one_machine_divide():
    one = problem()
    one.sharing.processes = Processes(0, 2)
    assert division(one, {}) is None
    one.sharing = None
    assert division(one, {}) is None


def targets(graph):
    return [
        str(node.target).removesuffix(".default") for node in graph.graph.nodes if node.op == "call_function"
    ]


def test_what_is_gathered_is_written_where_it_belongs():
    def step(first, second, share, *at, more=0):
        made = torch.ops.pyrolvm.shared_gather([first, second], 2 * share, *at)
        first.copy_(made[0])
        second.copy_(made[1] + more if more else made[1])
        return ()

    at = torch.zeros(8, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)
    inputs = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(5), *at]
    assert targets(inductor.functional(step, inputs)) == ["aten.mul.Tensor", "pyrolvm.shared_gather_"]
    assert "pyrolvm.shared_gather" in targets(inductor.functional(partial(step, more=1), inputs))


def test_transposed_products_are_products_of_transposes():
    def step(x, g, other):
        product = x.t() @ g
        return product.t() * 2, other @ g, (other @ x).t() + (other @ x).t()

    inputs = [torch.randn(5, 3), torch.randn(5, 4), torch.randn(2, 5)]
    graph = inductor.functional(step, inputs)
    products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default]
    assert not any(user.target is torch.ops.aten.permute.default for node in products for user in node.users)
    for made, wanted in zip(graph(*inputs), step(*inputs), strict=True):
        assert torch.allclose(made, wanted, atol=1e-6)
        assert made.is_contiguous()
    rewrites.transpose_factors(graph)
    assert torch.allclose(graph(*inputs)[0], step(*inputs)[0], atol=1e-6)
