"""What the tests of models share: a parameter store of their own, and the irises."""

import pyro
import pytest
import torch
from sklearn.datasets import load_iris


@pytest.fixture(autouse=True)
def _own_store():
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def iris():
    return torch.tensor(load_iris().data)  # [150, 4], float64
