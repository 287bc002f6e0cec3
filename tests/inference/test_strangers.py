"""Faults that programs of strangers brought up, each with an exact answer."""

import subprocess
import sys
from functools import partial
from typing import ClassVar

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyrolvm

QUIET = {"progress": False, "engine": "eager"}
X = torch.randn(30, generator=torch.Generator().manual_seed(0)) + 1.0


def of_rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide:
    """A guide as an instance, its network an attribute."""

    def __init__(self):
        self.encoder = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))

    def __call__(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.unsqueeze(-1)).squeeze(-1), 0.5))

    def bound(self, x):
        self(x)


@pytest.mark.parametrize("of", [lambda g: g, lambda g: g.bound])
def test_networks_in_the_attributes_of_an_instance_answer_in_eval_mode(of):
    guide = Guide()
    fitted = pyrolvm.fit(of_rows, X, guide=of(guide), num_steps=2, **QUIET)
    with torch.no_grad():
        exact = guide.encoder.eval()(X.unsqueeze(-1)).squeeze(-1)
    guide.encoder.train()
    torch.testing.assert_close(fitted.encode(X), exact)


@pytest.mark.parametrize(
    "inside",
    [
        lambda guide: pyro.infer.config_enumerate(guide),
        lambda guide: pyro.poutine.scale(guide, scale=1.0),
        lambda guide: pyro.poutine.mask(pyro.poutine.block(guide, hide=["nothing"]), mask=True),
    ],
)
def test_networks_of_functions_inside_handlers_answer_in_eval_mode(inside):
    encoder = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)).double()

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x.unsqueeze(-1)).squeeze(-1), 0.5))

    fitted = pyrolvm.fit(of_rows, X.double(), guide=inside(guide), num_steps=2, **QUIET)
    with torch.no_grad():
        exact = encoder.eval()(X.double().unsqueeze(-1)).squeeze(-1)
    encoder.train()
    torch.testing.assert_close(fitted.encode(X), exact)


def test_a_parameter_of_another_stage_is_read_from_pyros_store():
    """As under SVI, where a second guide uses what the first program made: pyro.param(name) without a start."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("shift", torch.tensor(0.0)), pyro.param("spread")))

    with pyro.get_param_store().scope():
        pyro.param("spread", torch.tensor(0.3), constraint=dist.constraints.positive)
        fitted = pyrolvm.fit(of_rows, X, guide=guide, num_steps=1, learning_rate=1e-9, **QUIET)
    assert fitted.posterior(X, 400)["z"].std().item() == pytest.approx(0.3, rel=0.05)
    assert set(fitted.program.parameters) == {"shift", "spread"}


def test_a_loss_in_the_guide_is_no_part_of_its_density():
    """The evidence under the exact posterior is exact, whatever factor is trained beside it."""

    def guide(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.5**0.5))
            pyro.factor("loss", 3.0 * x, has_rsample=False)

    fitted = pyrolvm.fit(of_rows, X, guide=guide, num_steps=1, learning_rate=1e-12, **QUIET)
    evidence = fitted.log_evidence(X, num_samples=20, progress=False)
    torch.testing.assert_close(evidence.float(), dist.Normal(0.0, 2**0.5).log_prob(X), atol=1e-4, rtol=0)


def test_data_that_depend_on_data_are_predicted_together():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            x = pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
            pyro.sample("y", dist.Normal(x, 0.01), obs=y)

    fitted = pyrolvm.fit(model, X, X, guide=AutoNormal(model), num_steps=2, **QUIET)
    made = fitted.predict((X, X), 50)
    assert (made["y"] - made["x"]).abs().max() < 0.06
    assert made["x"].std() > 0.5


def test_data_that_share_no_draws_at_once_are_predicted_one_by_one():
    """A program that concatenates its data runs on one draw at a time only."""

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            x = pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
            assert x.shape == (30,)
            pyro.sample("y", dist.Normal(x, 0.01), obs=y)

    fitted = pyrolvm.fit(model, X, X, guide=AutoNormal(model), num_steps=2, **QUIET)
    made = fitted.predict((X, X), 7)
    assert made["y"].shape == (7, 30)
    assert (made["y"] - made["x"]).abs().max() < 0.06


def test_a_module_whose_forward_calls_its_model_is_called():
    class Forecasting(PyroModule):
        """As `pyro.contrib.forecast.ForecastingModel`."""

        def forward(self, x):
            self.spread = 2.0
            return self.model(x)

        def model(self, x):
            mu = pyro.sample("mu", dist.Normal(0.0, self.spread))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    fitted = pyrolvm.fit(Forecasting(), X, guide="AutoNormal", num_steps=2, **QUIET)
    assert [s.name for s in fitted.structure.latents] == ["mu"]


def test_data_outside_the_plate_of_rows_are_named():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        with pyro.plate("others", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fitted = pyrolvm.fit(model, X, X[:7], guide="AutoNormal", num_steps=2, **QUIET)
    with pytest.raises(pyrolvm.ProgramError, match="'y' belong to no row of the plate 'rows'"):
        fitted.log_evidence((X, X[:7]), num_samples=5, progress=False)


def test_one_row_may_be_given_without_its_dimension():
    """A plate of a single row that poutine.condition gives a value of the event's shape: nothing counts twice."""

    def model():
        with pyro.plate("rows", 1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    def guide():
        with pyro.plate("rows", 1):
            loc = pyro.param("loc", torch.tensor([[0.5, 1.0]]))
            pyro.sample("z", dist.Normal(loc, 0.5**0.5).to_event(1))

    x = torch.tensor([1.0, 2.0])
    given = pyro.poutine.condition(model, data={"x": x})
    fitted = pyrolvm.fit(given, (), guide=guide, num_steps=1, learning_rate=1e-9, **QUIET)
    assert fitted.history.elbo[0] == pytest.approx(
        dist.Normal(0.0, 2**0.5).log_prob(x).sum().item(), abs=1e-4
    )


def test_a_program_that_fails_to_draw_anew_says_what_to_type():
    network = nn.Linear(2, 1).double()

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Normal(0.0, 1.0))  # float64, where the location below is float32
            covariance = k.unsqueeze(-1).unsqueeze(-1) * 0 + torch.eye(2)
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=torch.float32), covariance))
            pyro.sample("x", dist.Normal(network(z.double()).squeeze(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Normal(pyro.param("k_loc", torch.tensor(0.0)), 1.0))
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    fitted = pyrolvm.fit(model, X.double(), guide=guide, num_steps=1, **QUIET)
    for ask in (lambda: fitted.sample(2), lambda: fitted.draws(X.double(), 2, prior=True)):
        with pytest.raises(pyrolvm.ProgramError, match="make all of them alike"):
            ask()


def test_what_a_loss_alone_takes_is_bound_to_it():
    """As the boosting tutorial of Pyro has it, whose loss takes an argument out of those of the step."""

    def loss(model, guide, *args, **kwargs):
        power = kwargs.pop("power")
        return power * pyro.infer.Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + pyro.param("shift", torch.tensor(0.0)), 0.5**0.5))

    options = {"guide": guide, "num_steps": 1, "learning_rate": 1e-9, **QUIET}
    exact = dist.Normal(0.0, 2**0.5).log_prob(X).mean().item()
    for given in (
        {"objective": partial(loss, power=2.0)},
        {"objective": loss, "model_kwargs": {"power": 2.0}},
    ):
        fitted = pyrolvm.fit(of_rows, X, **given, **options)
        assert fitted.history.elbo[0] == pytest.approx(2 * exact, abs=1e-4)
        assert set(fitted.posterior(X, 2)) == {"z"}


def test_covariates_without_columns_are_no_covariates():
    """As pyro.contrib.forecast has them: a tensor of as many rows as the data, [rows, 0]."""

    def model(x, covariates):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(covariates.sum(-1), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, covariates):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + pyro.param("shift", torch.tensor(0.0)), 0.5**0.5))

    none = torch.zeros(len(X), 0)
    fitted = pyrolvm.fit(model, X, none, guide=guide, num_steps=1, learning_rate=1e-9, **QUIET)
    found = fitted.log_evidence((X, none), num_samples=4, progress=False)
    torch.testing.assert_close(found.float(), dist.Normal(0.0, 2**0.5).log_prob(X), atol=1e-4, rtol=0)
    with pytest.raises(pyrolvm.DataError, match="is empty"):
        pyrolvm.fit(model, X[:0], none[:0], guide=guide, **QUIET)


class OnlyADensity(dist.TorchDistribution):
    """A likelihood that a user writes as a distribution, without a way to draw from it."""

    arg_constraints: ClassVar[dict] = {}
    support = dist.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).log_prob(value)


def test_a_likelihood_without_draws_has_a_posterior_all_the_same():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", OnlyADensity(m.expand(len(x))), obs=x)

    fitted = pyrolvm.fit(model, X, guide="AutoNormal", num_steps=2, **QUIET)
    assert fitted.posterior(X, 4)["m"].shape == (4,)
    exported = pyrolvm.to_inference_data(fitted, X, num_samples=3, progress=False)
    assert {"posterior", "prior", "log_likelihood"} <= set(exported.groups())
    assert "predictive check" in pyrolvm.diagnose(fitted, X, 10, progress=False).not_done
    for ask in (lambda: fitted.predict(X, 2), lambda: fitted.sample(2), lambda: fitted.reconstruct(X)):
        with pytest.raises(pyrolvm.ProgramError, match=r"sample\(\).*in its class$") as refused:
            ask()
        assert "\n" not in str(refused.value)


def test_rows_without_latents_of_their_own_cannot_be_refined():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    fitted = pyrolvm.fit(model, X, guide="AutoNormal", num_steps=1, **QUIET)
    with pytest.raises(pyrolvm.ProgramError, match=r"refine\(\) fits what each row has of its own"):
        fitted.refine(X, num_steps=2, progress=False)


def test_a_guide_that_closes_over_a_tensor_of_all_rows():
    """It runs on all of them alone: every question of these rows is answered, others are declined."""
    features = torch.stack([X, X**2], -1)

    def model(x):
        with pyrolvm.data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.tensor([0.5, 0.0]))
        with pyrolvm.data_plate(x):
            pyro.sample("z", dist.Normal(features @ weight, 0.5**0.5))

    fitted = pyrolvm.fit(model, X, guide=guide, num_steps=1, learning_rate=1e-9, **QUIET)
    found = fitted.log_evidence(X, num_samples=20, progress=False)
    torch.testing.assert_close(found.float(), dist.Normal(0.0, 2**0.5).log_prob(X), rtol=1e-4, atol=1e-4)
    assert fitted.refine(X, num_steps=2, progress=False).num_rows == len(X)
    assert "log p(x)" not in pyrolvm.diagnose(fitted, X, 25, progress=False).not_done
    with pytest.raises(pyrolvm.DataError, match="is no argument stands in model or guide"):
        fitted.posterior(X[:10], 2)
    with pytest.raises(pyrolvm.ProgramError, match="of all 30 rows and no argument"):
        pyrolvm.fit(model, X, guide=guide, num_steps=1, batch_size=10, **QUIET)


@pytest.mark.parametrize("flow", [dist.transforms.spline, dist.transforms.affine_coupling])
def test_a_flow_of_the_data_forgets_the_last_step(flow):
    """Under SVI the loop calls flow.clear_cache() after each step: what a flow remembers is of other parameters."""
    options = {"count_bins": 4} if flow is dist.transforms.spline else {"hidden_dims": [4]}
    flow, x = flow(2, **options), torch.randn(20, 2)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.TransformedDistribution(base, [flow]), obs=x)

    fitted = pyrolvm.fit(model, x, guide=lambda x: None, num_steps=3, learning_rate=0.05, **QUIET)
    found = fitted.log_evidence(x, progress=False)
    flow.clear_cache()
    exact = dist.TransformedDistribution(base, [flow]).log_prob(x)
    torch.testing.assert_close(found.float(), exact.detach(), rtol=1e-4, atol=1e-4)
    assert fitted.history.elbo.is_monotonic_increasing


@pytest.mark.parametrize("events", [0, 1])
def test_a_likelihood_that_draws_other_shapes_has_a_posterior(events):
    """As distributions of Pyro's contributions do, whose `sample` takes one sequence alone, or one step of it."""

    class One(dist.Normal):
        has_rsample = False

        def sample(self, sample_shape=()):
            return torch.zeros(0)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            of_a_row = dist.Normal(mu, 1.0).expand([len(x), 1]).to_event(1)  # it broadcasts to the data
            pyro.sample("x", of_a_row if events else One(mu, torch.ones(len(x))), obs=x)

    x = torch.randn(6, 4) if events else torch.randn(6)
    fitted = pyrolvm.fit(model, x, guide="AutoNormal", num_steps=2, engine="eager", progress=False)
    assert fitted.posterior(x, 4)["mu"].shape == (4,)
    found = pyrolvm.to_inference_data(fitted, x, num_samples=2, progress=False)
    assert "mu" in found.posterior
    with pytest.raises(
        pyrolvm.ProgramError, match=r"'x' \(\w+\) cannot draw new data: its sample\(\) gives \["
    ):
        fitted.predict(x, 4)


@pytest.mark.parametrize("at_once_alone", [True, False])
def test_a_likelihood_whose_sample_fails_has_a_posterior(at_once_alone):
    """For several draws at once, and then they are taken one by one; or always, and then `predict` says so."""

    class Fragile(dist.Normal):
        has_rsample = False

        def sample(self, sample_shape=()):
            if not at_once_alone or len(self.batch_shape) > 1:
                raise IndexError("index 1 is out of bounds")
            return super().sample(sample_shape)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", Fragile(mu, torch.ones(len(x))), obs=x)

    x = torch.randn(6)
    fitted = pyrolvm.fit(model, x, guide="AutoNormal", num_steps=2, engine="eager", progress=False)
    assert fitted.posterior(x, 4)["mu"].shape == (4,)
    if at_once_alone:
        assert fitted.predict(x, 4)["x"].shape == (4, 6)
        return
    with pytest.raises(
        pyrolvm.ProgramError, match=r"'x' \(Fragile\) cannot draw new data.*IndexError: index 1 is out"
    ):
        fitted.predict(x, 4)


def test_a_latent_under_mask_false_has_a_flat_prior_and_a_posterior():
    """The usual way to an improper prior: its log q counts, as under SVI, and its spread is that of the data."""

    def model(x):
        with pyro.poutine.mask(mask=False):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    fitted = pyrolvm.fit(model, X, guide="AutoNormal", optimizer="lbfgs", progress=False)
    draws = fitted.posterior(X, 4000)["mu"]
    assert draws.mean().item() == pytest.approx(X.mean().item(), abs=4 / (30 * 4000) ** 0.5)
    assert draws.std().item() == pytest.approx(30**-0.5, rel=4 / 8000**0.5)


def test_missing_discrete_entries_are_summed_out_where_the_whole_model_is_enumerated():
    """Pyro drops `infer=` beside an obs_mask; the refusal says what to write, and that is exact."""
    coins, seen = torch.tensor([1.0, 0, 1, 0]), torch.tensor([True, True, False, False])
    x = torch.tensor([1.0, 0, 1, 0])
    chance = torch.tensor([0.2, 0.9])

    def model(coins, seen, x):
        with pyro.plate("coins", len(x)):
            k = pyro.sample(
                "k", dist.Bernoulli(0.3), obs=coins, obs_mask=seen, infer={"enumerate": "parallel"}
            )
            pyro.sample("x", dist.Bernoulli(chance[k.long()]), obs=x)

    def guide(coins, seen, x):
        pyro.param("unused", torch.tensor(0.0))

    options = {"guide": guide, "objective": pyro.infer.TraceEnum_ELBO(), "num_steps": 1, **QUIET}
    with pytest.raises(pyrolvm.ProgramError, match=r"pyro.infer.config_enumerate\(model"):
        pyrolvm.fit(model, coins, seen, x, **options)


def test_covariance_of_a_bound_without_an_optimum_is_declined():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))  # nothing holds the z of half of the rows
            pyro.sample("x", dist.Normal(torch.where(torch.arange(len(x)) % 2 == 0, z, 0.0), 1.0), obs=x)

    fitted = pyrolvm.fit(model, X, guide="AutoNormal", num_steps=2, **QUIET)
    with pytest.raises(pyrolvm.PyrolvmError):
        fitted.covariance(X)


def test_a_network_with_pooling_is_traced_in_a_process_that_compiled_nothing():
    """inductor's decomposition of max_pool2d reads a module that is imported by its first compilation alone."""
    script = (
        "import torch; from pyrolvm.inference.engine.inductor import functional; "
        "functional(lambda x: torch.nn.functional.max_pool2d(x, 2), [torch.ones(1, 1, 4, 4)])"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_draws_that_nothing_uses_keep_their_place():
    """A sparse Gaussian process of classes: q(u) enters by its KL alone, and the likelihood draws f behind u."""
    x, bounds = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double(), []
    for engine in ("eager", "compiled"):
        process = gp.models.VariationalSparseGP(
            x,
            (x[:, 0] > 0).double(),
            gp.kernels.RBF(3, lengthscale=torch.ones(3)),
            x[:4].clone(),
            gp.likelihoods.Binary(),
            num_data=60,
            whiten=True,
            jitter=1e-4,
        ).double()
        fitted = pyrolvm.fit(
            process.model,
            (),
            guide=process.guide,
            objective=pyro.infer.TraceMeanField_ELBO(),
            num_steps=3,
            dtype="float64",
            **QUIET | {"engine": engine},
        )
        bounds.append(fitted.history.elbo.to_numpy())
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-3)
