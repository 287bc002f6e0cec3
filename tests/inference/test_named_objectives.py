"""Objectives by name: in `fit`, and as a model's own usual one."""

import pytest
import torch

import pyrolvm
from pyrolvm import PPCA, SettingError

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
