"""Nothing that runs in a test may change what another finds: Pyro's store, validation, generators' defaults."""

import hypothesis
import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def global_state_left_as_found():
    torch.manual_seed(0)
    store = pyro.get_param_store()
    before = (list(store), torch.get_default_dtype(), torch.distributions.Distribution._validate_args)
    yield
    after = (list(store), torch.get_default_dtype(), torch.distributions.Distribution._validate_args)
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    assert after == before, "the test left Pyro's or torch's global settings changed"


# property tests draw the same examples each time, and a busy machine does not fail them
hypothesis.settings.register_profile("pyrolvm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("pyrolvm")
