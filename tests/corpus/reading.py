"""Programs that read their data by Python: loops, branches and assertions on values."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn

from corpus.form import Pair, program

NO_LATENTS_OF_ROWS = {"encode": "no local latents"}


def mu_guide(*args):
    loc = pyro.param("loc", torch.tensor(0.1))
    pyro.sample("mu", dist.Normal(loc, 0.3))


@program(declines=NO_LATENTS_OF_ROWS, quick_compiled=True)
def loop_to_the_longest() -> Pair:
    """A loop to the longest sequence, with an assertion on the lengths."""
    x, lengths = torch.randn(6, 5), torch.tensor([3, 2, 4, 1, 2, 4])

    def model(x, lengths):
        assert lengths.max() <= x.shape[1]
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("sequences", len(x)):
            for t in range(int(lengths.max())):
                with pyro.poutine.mask(mask=t < lengths):
                    pyro.sample(f"x_{t}", dist.Normal(mu, 1.0), obs=x[:, t])

    return Pair(model, mu_guide, (x, lengths))


@program(declines=NO_LATENTS_OF_ROWS)
def rows_that_are_there() -> Pair:
    """Missing rows are left out by a mask that indexes the data."""
    x = torch.randn(12)
    x[[2, 5]] = -999.0

    def model(x):
        there = x > -99
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", int(there.sum())):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[there])

    return Pair(model, mu_guide, (x,))


@program(declines=NO_LATENTS_OF_ROWS)
def groups_from_labels() -> Pair:
    """As many group means as the labels name."""
    y, group = torch.randn(15), torch.arange(15) % 4

    def model(y, group):
        with pyro.plate("groups", int(group.max()) + 1):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean[group], 1.0), obs=y)

    return Pair(model, "AutoNormal", (y, group))


@program(declines=NO_LATENTS_OF_ROWS)
def documents_of_one_length() -> Pair:
    """Multinomial counts whose total is read from the data."""
    counts = torch.distributions.Multinomial(8, torch.ones(5)).sample((10,))

    def model(counts):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(counts.shape[-1])))
        with pyro.plate("documents", len(counts)):
            total = int(counts.sum(-1).max())
            pyro.sample("counts", dist.Multinomial(total, weights), obs=counts)

    def guide(counts):
        alpha = pyro.param("alpha", torch.full((5,), 2.0), constraint=dist.constraints.positive)
        pyro.sample("weights", dist.Dirichlet(alpha))

    return Pair(model, guide, (counts,))


@program(compiled="depends on 'temperature'", declines=NO_LATENTS_OF_ROWS)
def a_branch_on_a_parameter() -> Pair:
    """A parameter that Python clips: eager by nature."""
    x = torch.randn(12)

    def model(x):
        temperature = pyro.param("temperature", torch.tensor(1.0))
        scale = temperature if temperature.item() > 0.5 else torch.tensor(0.5)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, scale), obs=x)

    return Pair(model, mu_guide, (x,))


@program(missing={"k-hat per datum": "'k' is enumerated", "collapse": "'k' is enumerated"})
def enumerated_counts() -> Pair:
    """A binomial latent that is summed out, its total a tensor."""
    x = torch.randn(12) + 1.0

    def model(x, total):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Binomial(total, 0.4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k, pyro.param("scale", torch.tensor(1.0))), obs=x)

    return Pair(model, lambda x, total: None, (x, torch.tensor(3.0)), objective=TraceEnum_ELBO)


@program
def a_network_of_the_datas_width() -> Pair:
    """A lazily sized encoder."""
    x = torch.randn(10, 4)
    encoder = nn.LazyLinear(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(x):
        loc = encoder(x).squeeze(-1)
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5))

    return Pair(model, guide, (x,))
