"""Fits under the caller's `torch.autocast`."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm


def _fitted(engine: str, cast: bool) -> pyrolvm.FittedModel:
    generator = torch.Generator().manual_seed(0)
    templates = torch.rand(3, 40, generator=generator)
    x = templates[torch.randint(0, 3, (60,), generator=generator)].bernoulli(generator=generator)
    torch.manual_seed(0)
    model = pyrolvm.VAE(40, 2, hidden=(16,))
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        return pyrolvm.fit(model, x, num_steps=60, learning_rate=0.01, engine=engine, progress=False)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_the_networks_are_trained(engine: str) -> None:
    """The cache of autocast keeps a parameter as it was when it was first cast, until the block around it ends."""
    exact, cast = (_fitted(engine, c).history["elbo"] for c in (False, True))
    assert exact.iloc[-1] - exact.iloc[0] > 3
    assert cast.iloc[-1] == pytest.approx(exact.iloc[-1], abs=0.1)
    assert not cast.equals(exact)


def test_densities_are_in_float32() -> None:
    """A program that samples what a layer returns: the sample, and its density, are of float32."""
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(5, 6), torch.nn.Linear(3, 5)
    seen = []

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyrolvm.data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z) @ torch.eye(5), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyrolvm.data_plate(x):
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
        seen.append((loc.dtype, z.dtype))

    x = torch.randn(20, 5)
    with torch.autocast("cpu", torch.bfloat16):
        fitted = pyrolvm.fit(model, x, guide=guide, num_steps=30, engine="compiled", progress=False)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert fitted.history["kl"].notna().all()


def test_the_cache_of_the_caller_is_as_it_was() -> None:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        _fitted("eager", True)
        assert torch.is_autocast_cache_enabled()


def test_afterwards_the_caller_s_networks_are_the_trained_ones() -> None:
    """A network that was called in the same block before the fit is in autocast's cache as it was then."""
    torch.manual_seed(0)
    decoder, x = torch.nn.Linear(2, 5), torch.randn(20, 5)

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyrolvm.data_plate(x):
            pyro.sample("x", dist.Normal(decoder(torch.ones(2)), 1.0).to_event(1), obs=x)

    with torch.autocast("cpu", torch.bfloat16):
        decoder(torch.ones(2))
        pyrolvm.fit(
            model, x, guide=lambda x: None, num_steps=9, learning_rate=0.1, engine="eager", progress=False
        )
        after = decoder(torch.ones(2))
        torch.clear_autocast_cache()
        assert torch.equal(after, decoder(torch.ones(2)))
