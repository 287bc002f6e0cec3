"""A program's run repeated over draws of its noise."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm
from pyrolvm.inference.training import averaged
from pyrolvm.inference.training.one_draw import OneDraw, doubled

NORMALS = [
    (lambda t: t.normal_(), 0.0, 1.0),
    (lambda t: t.normal_(3.0), 3.0, 1.0),
    (lambda t: t.normal_(std=2.0), 0.0, 2.0),
    (lambda t: t.normal_(3.0, 2.0), 3.0, 2.0),
]
UNIFORMS = [
    (lambda t: t.uniform_(), 0.5, 1.0),
    (lambda t: t.uniform_(-2.0), -0.5, 3.0),
    (lambda t: t.uniform_(2.0, 6.0), 4.0, 4.0),
]
CASES = NORMALS + [(draw, mean, width / math.sqrt(12)) for draw, mean, width in UNIFORMS]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_noise_that_is_written_into_memory_is_drawn_apart_from_its_law(number):
    def model(x):
        m = pyro.param("m", torch.tensor(1.0))
        with pyrolvm.data_plate(x):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    draw, mean, sd = CASES[number]
    still = {"num_steps": 1, "learning_rate": 1e-9, "engine": "eager", "progress": False}
    program = pyrolvm.fit(model, torch.zeros(3), guide=lambda x: None, **still).program
    with doubled(program), torch.no_grad():
        [scale] = program.parameters.values()
        one = OneDraw(program, lambda: (scale * draw(torch.empty(5, dtype=torch.float64)),))
        [found] = one(torch.full((1,), 3.0, dtype=torch.float64), 4000, 0)
        assert found.shape == (4000, 5)
        assert (found / 3).mean().item() == pytest.approx(mean, abs=4 * sd / 20_000**0.5)
        assert (found / 3).std().item() == pytest.approx(sd, rel=4 / math.sqrt(2 * 20_000))


@pytest.mark.parametrize(
    ("after", "moved"), [((0.6, 2.0), 0.3), ((0.0, 2.6), math.log(1.3)), ((0.0, 2.0), 0.0)]
)
def test_optima_are_as_far_apart_as_means_in_sds_or_log_sds(after, moved):
    """Of normals, of which one never varies; the sd is that of the later one."""
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std()

    def draws(vector, num_draws, seed):
        held = torch.full((len(noise), 1), 7.0)
        return None, torch.cat([vector[0] + vector[1] * noise, held], 1)

    found = averaged._moved(draws, torch.tensor([0.0, 2.0]), torch.tensor(after), 100, 0)
    assert found == pytest.approx(moved, abs=1e-5)


@pytest.mark.parametrize(
    ("numbers", "first", "most"), [(1, 128, 4096), (100, 1024, 4096), (1000, 8192, 8192)]
)
def test_draws_to_begin_with_are_eight_times_the_shared_numbers(numbers, first, most):
    latents = [
        SimpleNamespace(batch_shape=(), event_shape=(numbers,), local=False),
        SimpleNamespace(batch_shape=(50,), event_shape=(40,), local=True),
    ]
    pair = SimpleNamespace(structure=SimpleNamespace(latents=latents), width=4, num_rows=50)
    assert averaged._numbers_of_draws(pair) == (first, most)
