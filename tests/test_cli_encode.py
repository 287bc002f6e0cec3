"""Standard deviations of codes: those of the guide's distributions, and none where they are not known."""

import torch
from programs import LocalNormal
from pyro.infer.autoguide import AutoNormal

import pyrolvm
from pyrolvm.inference.posterior.questions import deviations

X = torch.randn(30, generator=torch.Generator().manual_seed(0))
QUIET = {"progress": False, "engine": "eager", "num_steps": 1}


def test_the_spread_of_a_code_is_the_guides():
    program = LocalNormal()
    fitted = pyrolvm.fit(program.model, X, guide=program.guide, **QUIET)
    assert torch.equal(deviations(fitted, X)["z"], torch.ones(30))


def test_the_spread_of_a_computed_latent_is_unknown_and_not_zero():
    fitted = pyrolvm.fit(LocalNormal().model, X, guide=AutoNormal, **QUIET)
    assert deviations(fitted, X) == {}
