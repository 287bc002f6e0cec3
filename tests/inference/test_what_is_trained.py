"""What is trained is what the trace of the loss shows, where it begins, and what a fitted model keeps."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import easy_guide
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrolvm
from pyrolvm import PPCA, data_plate

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + 1.0
QUIET = {"progress": False, "engine": "eager", "learning_rate": 0.05, "num_steps": 20}


def model(x):
    loc = pyro.param("loc", torch.zeros(3))
    scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    with data_plate(x):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def nothing(x):
    pass


@pytest.fixture
def store():
    with pyro.get_param_store().scope():
        yield pyro.get_param_store()


class Network(nn.Module):
    """A model in the manner of Pyro's VAE, whose guide hides its encoder from the loss."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 3), nn.Linear(3, 1)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z.unsqueeze(-1)), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.poutine.block(hide_types=["param"]):
            pyro.module("encoder", self.encoder)
        with data_plate(x):
            pyro.sample("z", dist.Normal(self.encoder(x).squeeze(-1), 0.5))


def test_modules_that_are_registered_under_a_block_stay():
    torch.manual_seed(0)
    net = Network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fitted = pyrolvm.fit(net.model, X, guide=net.guide, **QUIET)
    assert {k.split(".")[-2] for k in fitted.program.parameters} == {"decoder"}
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder")


def branching():
    """A model with a parameter that its sixth step makes."""
    runs = []

    def late(x):
        runs.append(None)
        loc = pyro.param("loc", torch.zeros(3))
        if len(runs) > 15:
            loc = loc + pyro.param("late", torch.tensor(0.5), constraint=dist.constraints.positive)
        with data_plate(x):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return late


def test_a_parameter_of_a_later_branch_is_trained_and_resumed(tmp_path):
    whole = pyrolvm.fit(branching(), X, guide=nothing, **QUIET, checkpoint=tmp_path)
    late = whole.program.parameters["late"]
    assert late.item() != pytest.approx(torch.tensor(0.5).log().item())
    again = pyrolvm.fit(
        branching(), X, guide=nothing, checkpoint=tmp_path, resume=True, **{**QUIET, "num_steps": 60}
    )
    assert not torch.equal(again.program.parameters["late"], late)
    assert "late" in again.program.tensors()


def test_a_lazy_module_that_is_never_reached_is_refused_by_name():
    net = nn.ModuleDict({"used": nn.LazyLinear(1), "unused": nn.LazyLinear(1)})

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(net["used"](x).squeeze(-1), 1.0))

    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def model(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(x.shape).to_event(1), obs=x)

        def guide(self, x):
            guide(x)

    with pytest.raises(
        pyrolvm.ProgramError, match=r"unused.weight' is of a lazy module that the first run does not reach"
    ):
        pyrolvm.fit(Lazy(), X, **QUIET)


# ---------------------------------------------------------------- where it begins


def test_functions_go_on_from_pyros_store_as_under_svi(store):
    svi = SVI(model, nothing, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(50):
        svi.step(X)
    before = {k: v.detach().clone() for k, v in store._params.items()}
    loss = svi.evaluate_loss(X)
    fitted = pyrolvm.fit(model, X, guide=nothing, **{**QUIET, "num_steps": 3})
    assert fitted.history["elbo"][0] * 40 == pytest.approx(-loss, rel=1e-5)
    for name, value in before.items():  # the store itself is left alone
        assert torch.equal(store._params[name], value)
    assert not torch.equal(fitted.program.parameters["loc"], before["loc"])


def test_a_cell_that_is_run_twice_gives_the_same(store):
    first = pyrolvm.fit(model, X, guide=nothing, **QUIET)
    again = pyrolvm.fit(model, X, guide=nothing, **QUIET)
    assert torch.equal(first.program.parameters["loc"], again.program.parameters["loc"])
    assert not store._params


def test_what_another_program_left_in_the_store_is_not_taken(store):
    alone = pyrolvm.fit(model, X, guide=nothing, **QUIET)
    pyro.param("loc", torch.full((5,), 9.0))  # another shape
    pyro.param("scale", torch.tensor(3.0))  # another constraint
    pyro.module("decoder", nn.Linear(1, 3))  # a module carries its own values
    assert torch.equal(
        pyrolvm.fit(model, X, guide=nothing, **QUIET).program.parameters["loc"],
        alone.program.parameters["loc"],
    )
    torch.manual_seed(0)
    net = Network()
    start = net.decoder.bias.clone()
    fitted = pyrolvm.fit(net.model, X, guide=net.guide, **{**QUIET, "num_steps": 1, "learning_rate": 1e-9})
    assert torch.allclose(net.decoder.bias, start)
    assert len(fitted.program.parameters) == 2


def test_a_fitted_model_stays_when_its_module_is_trained_again(tmp_path):
    ppca = PPCA(3, 1)
    first = pyrolvm.fit(ppca, X, **QUIET)
    codes, draws = first.encode(X), first.posterior(X, 3)
    evidence = first.log_evidence(X, "exact")
    second = pyrolvm.fit(ppca, X, **{**QUIET, "num_steps": 200})
    assert not torch.allclose(second.encode(X), codes)
    assert torch.equal(first.encode(X), codes)
    assert torch.equal(first.posterior(X, 3)["z"], draws["z"])
    assert torch.equal(first.log_evidence(X, "exact"), evidence)
    first.save(tmp_path / "first")
    assert torch.equal(pyrolvm.load(tmp_path / "first").encode(X), codes)
    third = pyrolvm.fit(ppca, X, dtype="float64", **QUIET)
    assert third.encode(X).dtype == torch.float64
    assert torch.equal(first.encode(X), codes)
    assert ppca.loadings.dtype == torch.float64


def test_an_autoguide_that_is_trained_again_leaves_the_first_fit():
    def program(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with data_plate(x):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    guide = AutoNormal(program)
    first = pyrolvm.fit(program, X, guide=guide, **QUIET)
    draws = first.posterior(X, 4)["mu"]
    pyrolvm.fit(program, X + 5, guide=guide, **QUIET)
    assert torch.equal(first.posterior(X, 4)["mu"], draws)


def test_an_easyguide_whose_plate_has_a_fixed_size():
    """A trial run of fewer rows fails in it, and leaves nothing behind."""

    def program(x):
        with pyro.plate("data", 40):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([40, 3]).to_event(1), obs=x)

    @easy_guide(program)
    def guide(self, x):
        with self.plate("data", 40):
            loc = pyro.param("z_loc", torch.zeros(40))
            pyro.sample("z", dist.Normal(loc, 1.0))

    fitted = pyrolvm.fit(program, X, guide=guide, **QUIET)
    assert fitted.posterior(X, 3)["z"].shape == (3, 40)


# ---------------------------------------------------------------- two stages


def test_two_stages_with_the_first_held():
    """Autoencoder weights first, then a head on its codes; the second stage leaves the first as it is."""
    torch.manual_seed(0)
    net, head = Network(), nn.Linear(1, 1)
    y = X.sum(-1)
    pyrolvm.fit(net, X, **QUIET)
    net.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def second(x, y):
        pyro.module("head", head)
        with data_plate(x):
            pyro.sample("y", dist.Normal(head(net.encoder(x)).squeeze(-1), 1.0), obs=y)

    fitted = pyrolvm.fit(second, X, y, guide=lambda x, y: None, **QUIET)
    assert list(fitted.program.parameters) == ["head$$$weight", "head$$$bias"]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert fitted.history["elbo"].iloc[-1] > fitted.history["elbo"].iloc[0]


def test_a_parameter_at_the_edge_of_its_constraint_stays_there():
    """As under SVI: a positive parameter at 0 is at -inf without its constraint, and its gradient is 0."""
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))

    def model(x):
        scale = pyro.param("scale", torch.eye(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale), obs=x)

    fitted = pyrolvm.fit(
        model, x, guide=lambda x: None, num_steps=200, learning_rate=0.05, progress=False, engine="eager"
    )
    found = fitted.program.transform_of("scale")(fitted.program.tensors()["scale"])
    assert found[0, 1] == found[1, 0] == 0
    assert found.diagonal().detach().numpy() == pytest.approx(x.square().mean(0).numpy(), rel=0.05)
