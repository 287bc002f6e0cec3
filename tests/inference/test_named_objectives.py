"""Objectives by name: in `fit`, as a model's own usual one, and what a minibatch counts in each."""

import copy

import numpy as np
import pyro
import pytest
import torch

import pyrolvm
from pyrolvm import PPCA, VAE, BernoulliVAE, GaussianMixture, HierarchicalVAE, SettingError
from pyrolvm.controls import value_of
from pyrolvm.inference.objectives import OBJECTIVES, FreeBits, InfoELBO, as_objective, estimate
from pyrolvm.plates import data_rows

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
QUIET = {"num_steps": 3, "progress": False, "engine": "eager"}


class Bounded(PPCA):
    """PPCA that is usually trained by the importance-weighted bound of three draws."""

    def objective(self):
        return "renyi", {"alpha": 0.0, "num_particles": 3}


def test_a_name_is_its_class():
    by_name = pyrolvm.fit(PPCA(3, 1), X, objective="meanfield", **QUIET)
    assert by_name.settings["objective"] == "TraceMeanField_ELBO"


def test_a_models_usual_objective_trains_it_unless_fit_is_told_another():
    usual = pyrolvm.fit(Bounded(3, 1), X, **QUIET)
    assert (usual.settings["objective"], usual.settings["num_particles"]) == ("RenyiELBO", 3)
    assert pyrolvm.fit(Bounded(3, 1), X, objective="trace", **QUIET).settings["objective"] == "Trace_ELBO"


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(SettingError, match=r"objective='elbow' is not known.*meanfield"):
        pyrolvm.fit(PPCA(3, 1), X, objective="elbow", **QUIET)


# ---------------------------------------------------------------------- a quarter of the data


ROWS = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).double()
BITS = {"reinforce", "nvil", "vimco", "muprop", "disarm", "rebar", "relax", "concrete", "tracegraph"}


def program_for(name):
    """(model, data): latent bits for estimators of discrete latents, a sum for "enum", else a Gaussian latent."""
    torch.manual_seed(0)
    if name in BITS:
        return BernoulliVAE(4, 3, num_layers=1 if name == "concrete" else 2).double(), (ROWS > 0).double()
    return (GaussianMixture(4, 2) if name == "enum" else VAE(4, 2, "gaussian", hidden=(5,))).double(), ROWS


def made(name):
    return OBJECTIVES[name](max_plate_nesting=1) if name == "enum" else OBJECTIVES[name]()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_minibatch_stands_for_all_data_in_the_bound_its_terms_and_every_gradient(name):
    """12 of 48 rows: four times what 12 of 12 rows give under the same noise, of the objective's own modules too."""
    model, x = program_for(name)
    objective, found = as_objective(made(name)), []
    controls = {k: value_of(k, s, 1.0) for k, s in objective.controls().items()}
    with pyro.get_param_store().scope(), data_rows(12, torch.arange(12)):
        estimate(objective, model.model, model.guide, (x,), **controls)  # its modules are made
    before = copy.deepcopy({k: m.state_dict() for k, m in objective.modules().items()})
    for total in (12, 48):
        for key, module in objective.modules().items():
            module.double().load_state_dict(before[key])
        torch.manual_seed(5)
        with pyro.get_param_store().scope(), data_rows(total, torch.arange(12)):
            result = estimate(objective, model.model, model.guide, (x,), **controls)
        own = [p for m in objective.modules().values() for p in m.parameters()]
        losses = [(result.surrogate, list(model.parameters()))]
        losses += [(result.own_loss, own)] if result.own_loss is not None else []
        gradients = [
            g
            for loss, leaves in losses
            for g in torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
        ]
        found.append([result.bound, *result.terms.values(), *gradients])
    assert any(value.abs().max() > 0 for value in found[0])
    for few, all_data in zip(*found, strict=True):
        torch.testing.assert_close(all_data, 4 * few)


@pytest.mark.parametrize("name", ["vimco", "concrete", "iwae"])
def test_a_bound_of_several_draws_is_above_their_mean_bound(name):
    """log (1/K) sum w >= (1/K) sum log w = log-likelihood - KL, draw by draw; with a sign turned it is not."""
    settings = {"num_particles": 4, "prior_temperature": None} if name == "concrete" else {"num_particles": 4}
    model, x = (
        (VAE(4, 2, "gaussian", hidden=(5,)).double(), ROWS) if name == "iwae" else program_for("concrete")
    )
    with torch.no_grad():  # a guide far from the prior, and a likelihood that says little
        for parameter in model.parameters():
            parameter.mul_(4)
    objective = as_objective(OBJECTIVES[name](**settings))
    controls = {k: value_of(k, s, 1.0) for k, s in objective.controls().items()}
    with pyro.get_param_store().scope(), data_rows(12, torch.arange(12)):
        found = estimate(objective, model.model, model.guide, (x,), **controls)
    mean = found.terms["log_likelihood"] - found.terms["kl"]
    assert found.terms["kl"] > 1.0
    assert mean <= found.bound <= mean + 12 * 200


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", [pyro.infer.Trace_ELBO, FreeBits, InfoELBO])
def test_the_kl_of_each_latent_is_a_mean_over_draws_and_adds_up(kind, together):
    bound = kind(num_particles=3, vectorize_particles=together)
    model = HierarchicalVAE(4, (3, 2), "gaussian", hidden=(8,))
    history = pyrolvm.fit(model, ROWS, objective=bound, **QUIET).history
    np.testing.assert_allclose(history["kl_z1"] + history["kl_z2"], history["kl"], rtol=1e-5)
