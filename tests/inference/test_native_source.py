"""The native loop: inductor's C++ with its housekeeping before the loop."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from torch._inductor import cpu_vec_isa

from pyrolvm.inference.engine import draws, inductor, rewrites, source
from pyrolvm.inference.engine.garbage import NEW_OBJECTS, seldom_collected
from pyrolvm.inference.engine.source import LARGEST_KEPT, looped


def entry(*lines: str) -> str:
    body = ["py::gil_scoped_release_simple release;", *lines]
    return "void f() {\n" + "".join(f"    {line}\n" for line in body) + "} // inductor_entry_impl\n"


BUFFER = (
    "static constexpr int64_t int_array_0[] = {%dL, };",
    "AtenTensorHandle buf0_handle;",
    "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, int_array_0, int_array_0, "
    "cached_torch_dtype_float32, cached_torch_device_type_cpu, 0, &buf0_handle));",
    "RAIIAtenTensorHandle buf0(buf0_handle);",
)
START = (
    "auto inputs = steal_from_raw_handles_to_raii_handles(input_handles, 1);",
    "auto arg0_1 = std::move(inputs[0]);",
)


def parts(*lines: str) -> tuple[str, str]:
    before, loop, within = looped(entry(*START, *lines)).partition("for (int64_t left")
    assert loop
    return before, within


def small(*lines: str) -> list[str]:
    return [line % 3 if "%d" in line else line for line in (*BUFFER, *lines)]


def test_buffers_and_views_are_made_once_and_reused_by_name():
    view = (
        "wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper(arg0_1, 1, int_array_0, int_array_0, 0L))"
    )
    before, within = parts(
        *small(
            f"mm_out(buf0, {view});",
            "auto buf1 = std::move(buf0);  // reuse",
            "use(buf1);",
            "arg0_1.reset();",
        )
    )
    assert "empty_strided" in before
    assert "RAIIAtenTensorHandle buf0" in before
    assert "auto& buf1 = buf0;" in before
    assert f"auto view_0 = {view};" in before
    assert within.split("\n")[1:3] == ["    mm_out(buf0, view_0);", "    use(buf1);"]
    assert "reset" not in within


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([line % (LARGEST_KEPT + 1) if "%d" in line else line for line in BUFFER], "large"),
        (small("give(buf0.release());"), "given away"),
    ],
    ids=["large", "given away"],
)
def test_buffers_that_cannot_be_kept_stay_in_the_step(lines, why):
    before, within = parts(*lines, "auto buf1 = std::move(buf0);  // reuse", "buf1.reset();")
    assert "empty_strided" not in before, why
    order = [
        "AtenTensorHandle buf0_handle;",
        "empty_strided",
        "RAIIAtenTensorHandle buf0(",
        "std::move(buf0)",
    ]
    places = [within.index(text) for text in [*order, "buf1.reset();"]]
    assert places == sorted(places)


@pytest.mark.parametrize("code", ["int main() {}", entry(*START, "give(arg0_1.release());")])
def test_another_form_is_refused(code):
    with pytest.raises(RuntimeError, match=r"inductor's C\+\+"):
        looped(code)


def test_a_function_of_a_broadcast_is_taken_before_it():
    def run(scale: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> tuple[()]:
        wide = scale.expand(3, 4).expand(5, 3, 4)
        out.copy_((x / wide.log()).sum() + wide.square().sum())
        return ()

    inputs = [torch.full((4,), 2.0), torch.randn(5, 3, 4), torch.zeros(())]
    graph = inductor.functional(run, inputs)
    shapes = [
        n.meta["val"].shape for n in graph.graph.nodes if n.op == "call_function" and "log" in str(n.target)
    ]
    assert shapes == [(4,)]
    graph(*inputs)
    torch.testing.assert_close(inputs[2], (inputs[1] / inputs[0].log()).sum() + 15 * inputs[0].square().sum())


@pytest.mark.parametrize("by_inversion", [True, False])
def test_a_category_is_drawn_as_torch_draws_it(monkeypatch, by_inversion):
    if by_inversion and not rewrites.exponential_by_inversion():
        pytest.skip("this machine's exponential noise is MKL's")
    monkeypatch.setattr(rewrites, "exponential_by_inversion", lambda: by_inversion)
    weights, out = torch.rand(200, 5), torch.zeros(200, dtype=torch.int64)

    def run(weights: torch.Tensor, out: torch.Tensor) -> tuple[()]:
        out.copy_(torch.multinomial(weights, 1, replacement=True)[:, 0])
        return ()

    graph = inductor.functional(run, [weights, out])
    torch.manual_seed(4)
    expected = torch.multinomial(weights, 1, replacement=True)[:, 0]
    after = torch.get_rng_state()
    torch.manual_seed(4)
    graph(weights, out)
    assert torch.equal(out, expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_what_is_written_twice_is_done_once():
    def run(scale: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> tuple[()]:
        noise = torch.rand(4) + torch.rand(4)  # two draws, though they look alike
        out.copy_(
            noise + scale.exp() * x + scale.exp() + scale.detach().exp() + (scale.add(1) - scale.add(1.0))
        )
        return ()

    inputs = [torch.full((4,), 0.5), torch.randn(4), torch.zeros(4)]
    graph = inductor.functional(run, inputs)
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("exp" in name for name in names) == 1
    assert sum("rand" in name for name in names) == 2
    torch.manual_seed(0)
    graph(*inputs)
    torch.manual_seed(0)
    scale, x = inputs[:2]
    torch.testing.assert_close(inputs[2], torch.rand(4) + torch.rand(4) + scale.exp() * x + 2 * scale.exp())


@pytest.mark.parametrize("categories", [5, 20])
def test_categories_are_drawn_in_their_proportions_and_never_where_there_is_none(categories):
    weights = torch.rand(categories, generator=torch.Generator().manual_seed(1))
    weights[[0, 2, -1]] = 0
    torch.manual_seed(0)
    with draws.by_inversion():
        found = torch.multinomial(weights.expand(100_000, categories), 1)
        several = torch.multinomial(weights, 3)  # without replacement: torch's own
    assert found.shape == (100_000, 1)
    assert found.dtype == torch.int64
    assert len(set(several.tolist())) == 3
    shares, expected = found.flatten().bincount(minlength=categories) / 1e5, weights / weights.sum()
    assert (shares[[0, 2, -1]] == 0).all()
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / 1e5).sqrt()).all()


@pytest.mark.parametrize("more", [0, 20])
def test_evenly_spaced_numbers_draw_each_category_as_often_as_it_weighs(monkeypatch, more):
    weights = torch.tensor([0.0, 3, 0, 1, 4, 0] + more * [0.0])
    monkeypatch.setattr(torch, "rand", lambda size, dtype, device: torch.arange(8).to(dtype) / 8)
    assert draws.inverted(weights.expand(8, -1)).tolist() == [1, 1, 1, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("more", [0, 20])
def test_the_largest_uniform_number_draws_no_category_of_weight_zero(monkeypatch, more):
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: torch.full(*size, 1 - 2**-24))
    for total in torch.logspace(-3, 3, 1000):
        weights = torch.tensor([[0.3, 0.7, 0.0], [0.0, 1.0, 0.0]]) * total
        weights = torch.cat([weights, torch.zeros(2, more)], 1)
        assert draws.inverted(weights).tolist() == [1, 1]


def test_other_threads_draw_as_torch_does():
    found, weights = [], torch.rand(50, 5)
    torch.manual_seed(0)
    expected = torch.multinomial(weights, 1)
    with draws.by_inversion():
        torch.manual_seed(0)
        other = threading.Thread(target=lambda: found.append(torch.multinomial(weights, 1)))
        other.start()
        other.join()
    assert torch.equal(found[0], expected)


def test_kernels_are_compiled_beside_the_wrapper():
    def kernel(length):
        return f"#include <torch/csrc/inductor/cpp_prefix.h>\n{'k' * length}\n"

    wrapper = "w\n} // inductor_entry_impl\n"
    kernels = [kernel(n) for n in (10, 40_000, 30_000)]
    code = wrapper + "".join(kernels)
    assert source.kernels_apart(code) == (wrapper, kernels)
    assert source.balanced(wrapper, kernels, 1) == [wrapper + kernels[1] + kernels[2] + kernels[0]]
    assert source.balanced(wrapper, [], 2) == [wrapper]
    assert source.balanced(wrapper, kernels, 2) == [wrapper + kernels[2], kernels[1] + kernels[0]]
    assert source.balanced(wrapper, kernels, 9) == source.balanced(wrapper, kernels, 2)
    long = [kernel(n) for n in (150_000, 160_000, 100)]
    assert source.balanced(wrapper, long, 3) == [wrapper + long[2], long[1], long[0]]
    assert len(source.balanced(wrapper, long, 64)) == 4


def test_no_program_is_compiled_to_try_the_compiler(monkeypatch):
    def tried(self, code):
        raise AssertionError

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", tried)
    command = inductor.compiler_command([Path("a step.cpp")], Path("step.so"), Path("a header.h"))
    assert {"a step.cpp", "a header.h", "-o", "step.so"} <= set(command)
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0  # for others to try


def test_garbage_is_looked_for_seldom_and_then_as_before():
    usual = gc.get_threshold()
    try:
        for own, within in ((700, NEW_OBJECTS), (0, 0), (2 * NEW_OBJECTS, 2 * NEW_OBJECTS)):
            gc.set_threshold(own, 9, 8)
            with seldom_collected():
                assert gc.get_threshold() == (within, 9, 8)
            assert gc.get_threshold() == (own, 9, 8)
    finally:
        gc.set_threshold(*usual)
