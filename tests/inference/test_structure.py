"""What does not fit together is refused before the first step, in one sentence that says what to type."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, RegisteredNets
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrolvm
from pyrolvm import ProgramError, SettingError, data_plate

X = torch.linspace(-1.0, 1.0, 24)


def fit(model, guide, x=X, **options):
    return pyrolvm.fit(model, x, guide=guide, progress=False, **({"num_steps": 2} | options))


def two_latents(x):
    with data_plate(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def only_a(x):
    scale = pyro.param("scale", torch.tensor(1.0))
    with data_plate(x):
        pyro.sample("a", dist.Normal(x, scale))


def test_a_forgotten_site_is_an_error_not_the_prior():
    with pytest.raises(ProgramError, match=r"the guide has no site 'b'.*left_to_prior"):
        fit(two_latents, only_a)


def test_a_site_left_to_the_prior_on_purpose_contributes_nothing_to_the_kl():
    def model(x):
        with data_plate(x):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(0.0, 1.0), infer={"left_to_prior": True})
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def without(x):
        with data_plate(x):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    from pyro.infer import TraceMeanField_ELBO

    options = {"objective": TraceMeanField_ELBO(num_particles=100), "num_steps": 20, "learning_rate": 1e-12}
    marked, plain = (fit(m, only_a, **options).history["elbo"] for m in (model, without))
    error = (marked.std() + plain.std()) / len(marked) ** 0.5
    assert abs(marked.mean() - plain.mean()) < 4 * error


def test_a_site_the_model_lacks_is_an_error():
    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        with data_plate(x):
            pyro.sample("a", dist.Normal(x, scale))
            pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("c", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="the guide samples 'c', which is no latent site of the model"):
        fit(two_latents, guide)


def test_a_global_latent_without_the_number_of_data_is_an_error():
    program = GlobalMean(plate=lambda x: pyro.plate("rows", len(x)))
    with pytest.raises(
        ProgramError, match=r"'m' is shared by all data.*6 rows of the batch, not 24.*data_plate\(x\)"
    ):
        fit(program.model, program.guide, batch_size=6)
    assert fit(program.model, program.guide).num_data == 24


def test_minibatches_without_a_data_plate_are_an_error():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, scale).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(ProgramError, match="no plate of the model runs over the rows"):
        fit(model, AutoNormal, batch_size=6)
    assert fit(model, AutoNormal).num_data == 1


def test_a_missing_to_event_is_met_with_the_table_of_sites():
    def model(x):
        with data_plate(x):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a.unsqueeze(-1), torch.ones(3)), obs=x)

    with pytest.raises(ProgramError) as error:
        fit(model, lambda x: only_a(x[:, 0]), torch.randn(24, 3))
    message = str(error.value)
    assert "'x'" in message or "site x" in message
    assert "24 vs 3" in message


def test_a_shape_that_happens_to_equal_the_batch_size_is_found():
    def model(x):
        weights = pyro.param("weights", torch.zeros(6))
        with data_plate(x):
            a = pyro.sample("a", dist.Normal(weights, 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("a", dist.Normal(x, 1.0))

    with pytest.raises(ProgramError, match="runs on a batch of 6 rows but not on 7"):
        fit(model, guide, batch_size=6)


def test_entering_the_data_plate_anew_is_met_with_what_to_type():
    def guide(x):
        only_a(x)
        with data_plate(x):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match=r"plate = pyrolvm.data_plate"):
        fit(two_latents, guide)


def test_a_network_that_nothing_registers_is_named():
    nets = RegisteredNets()
    encoder = nets.encoder

    def guide(x):
        with data_plate(x):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    with pytest.raises(
        ProgramError, match=r"network 'encoder' \(Sequential\).*pyro.module\('encoder', encoder\)"
    ):
        fit(nets.model, guide, torch.randn(24, 6))


def test_a_registered_network_is_trained():
    nets = RegisteredNets()
    before = [p.detach().clone() for p in (*nets.encoder.parameters(), *nets.decoder.parameters())]
    fitted = fit(nets.model, nets.guide, torch.randn(24, 6), batch_size=6, num_steps=5)
    after = [*nets.encoder.parameters(), *nets.decoder.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert set(fitted.program.parameters) >= {"decoder$$$0.weight", "encoder$$$2.bias"}


def test_parameters_frozen_by_the_user_stay_frozen():
    from pyro.nn import PyroModule, pyro_method

    class Frozen(PyroModule):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.tensor(1.0), requires_grad=False)
            self.loc = nn.Parameter(torch.tensor(0.0))

        @pyro_method
        def model(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + self.offset, 1.0), obs=x)

        @pyro_method
        def guide(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Normal(self.loc, 1.0))

    module = Frozen()
    fitted = fit(module, None, num_steps=5, learning_rate=0.1)
    assert module.offset.item() == 1.0
    assert not module.offset.requires_grad
    assert module.loc.item() != 0.0
    assert list(fitted.program.parameters) == ["loc"]
    assert list(fitted.program.buffers) == ["offset"]


def test_programs_that_are_none_are_refused():
    with pytest.raises(ProgramError, match=r"brings no guide: .*guide="):
        pyrolvm.fit(two_latents, X)
    with pytest.raises(ProgramError, match="must be a LatentVariableModel or a callable"):
        pyrolvm.fit("vae", X)
    with pytest.raises(ProgramError, match="pass an instance"):
        pyrolvm.fit(pyrolvm.PPCA, X)
    with pytest.raises(ProgramError, match="guide must be callable"):
        pyrolvm.fit(two_latents, X, guide=3)
    with pytest.raises(ProgramError, match="depends on no parameter"):
        fit(_no_parameters, lambda x: None)


def _no_parameters(x):
    with data_plate(x):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def test_what_the_program_raises_is_told_with_the_shapes():
    def model(x):
        with data_plate(x):
            pyro.sample("x", dist.Normal(x @ torch.ones(5), 1.0), obs=x)

    with pytest.raises(ProgramError, match=r"the model failed on data of shapes args\[0\]: \[24\]"):
        fit(model, lambda x: None)


def test_impossible_starting_values_are_refused():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with data_plate(x):
            pyro.sample("x", dist.Uniform(loc, loc + 0.5), obs=x)

    with pytest.raises(ProgramError):
        fit(model, lambda x: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "choose from auto, compiled, eager"),
        ({"on_nan": "hope"}, "raise, rollback, skip"),
        ({"optimizer": "adamm"}, "choose from adam"),
        ({"learning_rate": -1.0}, "must be positive"),
        ({"clip_norm": 0.0}, "must be positive"),
        ({"num_steps": 0}, "positive whole number"),
        ({"num_epochs": 2}, "not both"),
        ({"kl_warmup": 2.0}, "share of the steps"),
        ({"device": "tpu7"}, "not known"),
        ({"device": "cuda:7"}, "not on this machine"),
        ({"validation": 0.001}, "leaves 0 to hold out"),
        ({"optimizer_options": {"momentum": 0.9}}, "do not suit Adam"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"resume": True}, "needs checkpoint"),
        ({"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, "depends on the bound"),
        ({"schedule": lambda optimizer: 3}, "must return a torch scheduler"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        fit(two_latents, AutoNormal, **options)


def shaped(model_events=1, data_events=1):
    """A factor model whose two sites have so many event dimensions."""

    def model(x):
        W = pyro.param("W", torch.ones(2, 3))
        with data_plate(x):
            zeros = x.new_zeros(len(x), 2)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(model_events))
            pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(data_events), obs=x)

    def guide(x):
        a = pyro.param("a", torch.zeros(3, 2))
        with data_plate(x):
            pyro.sample("z", dist.Normal(x @ a, 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_events": 0},
            r"'z' has 2 entries where the plate 'data' has 10 rows.*write .to_event\(1\) at 'z'",
        ),
        ({"data_events": 0}, r"write .to_event\(1\) at 'x'"),
        ({"model_events": 2}, r"'z' has event shape \(10, 2\) in the model and \(2,\) in the guide"),
        ({"data_events": 2}, r"'x' stands in the plate 'data', but its value .* count once for every row"),
    ],
)
def test_the_commonest_mistakes_of_shape_are_explained(options, message):
    model, guide = shaped(**options)
    with pytest.raises(ProgramError, match=f"(?s){message}"):
        pyrolvm.fit(model, torch.randn(50, 3), guide=guide, num_steps=1, batch_size=10, progress=False)
