"""The commonest mistakes in a program: each is refused in words that name the site and what to type."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrolvm
from pyrolvm import ProgramError

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
QUIET = {"num_steps": 1, "progress": False, "engine": "eager"}


def model(x, event=1, x_event=1, dim=None, rows=None, latent_rows=None):
    w = pyro.param("w", torch.ones(2, 3))
    with pyro.plate("data", rows or len(x), dim=dim):
        z = pyro.sample("z", dist.Normal(torch.zeros(latent_rows or len(x), 2), 1.0).to_event(event))
        pyro.sample("x", dist.Normal(z @ w, 1.0).to_event(x_event), obs=x)


def guide(x, event=1, size=2, name="z", dim=None, network=None, obs=None):
    a = pyro.param("a", lambda: torch.ones(3, size))
    with pyro.plate("data", len(x), dim=dim):
        pyro.sample(name, dist.Normal(x @ a if network is None else network(x), 1.0).to_event(event), obs=obs)


def latent_outside(x):
    w = pyro.param("w", torch.ones(2, 3))
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z @ w, 1.0).to_event(1), obs=x)


def registered(network):
    def with_network(x):
        pyro.module("encoder", network)
        guide(x, network=network)

    return with_network


forgotten = nn.Linear(3, 2)


def with_forgotten(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(forgotten(x), 1.0).to_event(1))


def twice(x):
    model(x)
    pyro.sample("z", dist.Normal(0.0, 1.0))


def binary(x):
    w = pyro.param("w", torch.ones(2, 3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=x)


def without_data(x):
    w = pyro.param("w", torch.ones(2, 3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ w, 1.0).to_event(1))


def nothing(x):
    pass


def negative(x):
    s = pyro.param("s", torch.tensor(-1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(3), s).to_event(1), obs=x)


def drawn_state(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k.unsqueeze(-1).expand(-1, 3), 1.0).to_event(1), obs=x)


def positive(x):
    w = pyro.sample("w", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.expand(3), 1.0).to_event(1), obs=x)


def guide_of_reals(x):
    pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(-9.0)), 0.1))


def fixed_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ torch.ones(2, 3), 1.0).to_event(1), obs=x)


def detached(x):
    a = pyro.param("a", lambda: torch.ones(3, 2)).detach()
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ a, 1.0).to_event(1))


@pyro.infer.config_enumerate
def of_fixed_sizes(x):
    p = pyro.param("p", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(p))
        pyro.sample("x", dist.Normal(k.unsqueeze(-1).expand(len(x), 3), 1.0).to_event(1), obs=x)


MISTAKES = {
    "to_event forgotten at a latent": (partial(model, event=0), guide, X, "write .to_event(1) at 'z'"),
    "to_event forgotten at the data": (partial(model, x_event=0), guide, X, "write .to_event(1) at 'x'"),
    "to_event forgotten in the guide": (model, partial(guide, event=0), X, "write .to_event(1) at 'z'"),
    "to_event forgotten, square data": (partial(model, x_event=0), guide, X[:3], "write .to_event(1) at 'x'"),
    "to_event surplus at the data": (
        partial(model, x_event=2),
        guide,
        X,
        "take one dimension off its .to_event",
    ),
    "to_event surplus in the guide": (
        model,
        partial(guide, event=2),
        X,
        "'z' has event shape (2,) in the model and (20, 2) in the guide",
    ),
    "to_event beyond the shape": (partial(model, x_event=3), guide, X, "write .to_event(2) or less"),
    "plate at another dimension": (
        partial(model, dim=-2),
        partial(guide, dim=-2),
        X,
        "the rows of 'z' are at dimension -1 in the model: write dim=-1",
    ),
    "plate of another size": (
        partial(model, rows=10),
        guide,
        X,
        "of 10 rows in the model and of 20 in the guide",
    ),
    "latent outside the plate": (latent_outside, guide, X, "put it inside their plate"),
    "guide site of another shape": (
        model,
        partial(guide, size=3),
        X,
        "'z' is [20, 2] in the model and [20, 3] in the guide",
    ),
    "obs forgotten": (without_data, guide, X, "give it pyro.sample('x', ..., obs=...)"),
    "to_event surplus at a latent, in both": (
        partial(model, event=2),
        partial(guide, event=2),
        X,
        "'z' has the rows of 'data' in its event shape (20, 2), too: take one dimension off its .to_event",
    ),
    "fixed sizes around what is summed out": (
        of_fixed_sizes,
        nothing,
        X,
        "'k' is summed out: its 2 values come along one more dimension",
    ),
    "name with another letter": (model, partial(guide, name="zz"), X, "did you mean 'z'?"),
    "site forgotten": (model, lambda x: pyro.param("a", torch.ones(())), X, "sample 'z' in the guide"),
    "pyro.module forgotten": (model, with_forgotten, X, "write pyro.module('forgotten', forgotten)"),
    "networks of two types": (
        model,
        registered(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2).double())),
        X,
        "write network.float() before the fit",
    ),
    "missing values": (model, guide, X.clone().fill_diagonal_(math.nan), "args[0] holds NaN at index [0, 0]"),
    "a negative scale": (negative, nothing, X, "'scale' must be positive: give its pyro.param constraint="),
    "a layer of another width": (model, registered(nn.Linear(5, 2)), X, "takes 5 columns gets 3"),
    "data in the guide": (
        model,
        partial(guide, obs=torch.zeros(20, 2)),
        X,
        "the guide observes 'z': take obs= off",
    ),
    "a discrete latent under an AutoGuide": (drawn_state, "AutoNormal", X, "mark it in the model by infer="),
    "a guide without arguments": (model, lambda: None, X, "called with the same arguments, here args[0]"),
    "a guide outside the support": (
        positive,
        guide_of_reals,
        X,
        "such as dist.LogNormal for positive values",
    ),
    "parameters that are detached": (fixed_model, detached, X, "take .detach(), .item() and float() off"),
    "data of integers": (model, registered(nn.Linear(3, 2)), X.long(), "write x.float() in the program"),
    "network elsewhere": (model, registered(nn.Linear(3, 2, device="meta")), X, "write network.to('cpu')"),
    "two sites of one name": (twice, guide, X, "give one of the two sites 'z' another name"),
    "data outside the support": (binary, guide, X, "to be within the support (Boolean())"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_common_mistake_is_told_with_what_to_type(name):
    wrong_model, wrong_guide, x, words = MISTAKES[name]
    with pytest.raises(ProgramError) as error:
        pyrolvm.fit(wrong_model, x, guide=wrong_guide, **QUIET)
    assert words in str(error.value)
    assert "Trace Shapes" not in str(error.value)
    assert "tensor([" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_data_of_float64_run_in_a_net_of_float32():
    network = nn.Linear(3, 2)
    fitted = pyrolvm.fit(model, X.double(), guide=registered(network), **QUIET)
    assert fitted.posterior(X.double(), 2)["z"].dtype is torch.float32


@pytest.mark.filterwarnings("ignore")
def test_networks_of_float64_are_trained_in_float64():
    """As under SVI, where data of float64 meet them; two functions that share nothing with a module of the user's."""
    network = nn.Linear(3, 2).double()
    fitted = pyrolvm.fit(model, X.double(), guide=registered(network), **QUIET)
    assert network.weight.dtype is torch.float64
    assert fitted.posterior(X, 2)["z"].dtype is torch.float64
    assert pyrolvm.fit(model, X.double(), guide=guide, **QUIET).posterior(X, 2)["z"].dtype is torch.float32


@pytest.mark.filterwarnings("ignore")
def test_too_shallow_a_nesting_is_told():
    objective = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)
    with pytest.raises(ProgramError, match="plates are nested 1 deep: pass max_plate_nesting=1"):
        pyrolvm.fit(pyro.infer.config_enumerate(drawn_state), X, guide=nothing, objective=objective, **QUIET)


def test_a_model_that_runs_only_with_its_states_summed_out():
    """As Pyro's tutorial of tracking, which gathers along the dimension that the states add."""

    def summed(x):
        means = pyro.param("means", torch.tensor([-1.0, 0.0, 1.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[k].reshape(3, -1), 1.0), obs=x)

    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    with pytest.raises(ProgramError, match=r"\(k\) are summed out, and fails at one value of them.*Vindex"):
        pyrolvm.fit(summed, torch.randn(7), guide=lambda x: None, objective=elbo, **QUIET)


def test_data_under_a_flow_without_an_inverse():
    flow = dist.transforms.planar(3)

    def flowing(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, [flow]), obs=x)

    with pytest.raises(ProgramError, match=r"cannot be computed at given values .*affine_coupling or spline"):
        pyrolvm.fit(flowing, X, guide=lambda x: None, **QUIET)


def of_groups(group, y):
    with pyro.plate("groups", 4):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(level[group], 1.0), obs=y)


def of_torch(group, y):
    level = pyro.sample("level", torch.distributions.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def named_alike(group, y):
    with pyro.plate("data", 3):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(level.sum() * y.new_ones(len(y)), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "turned", "words"),
    [
        (of_groups, lambda g: g + 1, r"args\[0\] counts from 1 to 4, .*: pass args\[0\] - 1"),
        (of_groups, lambda g: g.float(), r"args\[0\] is used as an index: write \.long\(\)"),
        (of_torch, lambda g: g, "take pyro.distributions.Normal"),
        (named_alike, lambda g: g, "give this one a name of its own"),
    ],
)
def test_mistakes_of_labels_and_names_get_what_to_type(model, turned, words):
    group, y = torch.arange(20) % 4, torch.randn(20)
    with pytest.raises(pyrolvm.ProgramError, match=words):
        pyrolvm.fit(model, turned(group), y, guide="AutoNormal", num_steps=1, engine="eager", progress=False)


def test_a_data_loader_is_no_data():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, X[:, 0]), batch_size=5)
    with pytest.raises(ProgramError, match="fit takes minibatches itself"):
        pyrolvm.fit(of_groups, loader, guide="AutoNormal", **QUIET)


def made_in_every_call(x):
    network = pyro.module("network", nn.Linear(2, 3))  # of which Pyro keeps the first, and uses the newest
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(network(z), 1.0).to_event(1), obs=x)


def test_a_network_that_every_call_makes_is_to_be_made_once():
    with pytest.raises(ProgramError, match="make that once, outside the program, and register it"):
        pyrolvm.fit(made_in_every_call, X, guide=guide, **QUIET)
