"""Names of dimensions, from arrays and layouts alone."""

import numpy as np
import pytest

from pyrolvm import SettingError
from pyrolvm.diagnostics.tables import Layout, build_tables, event_dims


def test_axes_are_named_by_length_where_one_name_has_it():
    sites = {
        "W": Layout((), (5, 2)),
        "S": Layout((), (5, 5)),
        "weights": Layout((), (3,)),
        "odd": Layout((), (7,)),
        "z": Layout(("data",), (2,), local=True),
        "k": Layout(("data",), categories=3),
        "x": Layout(("data",), (5,), observed=True, local=True),
    }
    found = event_dims(sites, {})
    assert found["W"] == ("feature", "z_dim")
    assert found["S"] == ("feature", "feature_bis")
    assert found["weights"] == ("k_category",)
    assert found["odd"] == ("odd_dim",)
    sites["u"] = Layout(("data",), (5,), local=True)  # now five may be either
    found = event_dims(sites, {})
    assert found["W"] == ("W_dim_0", "z_dim")
    assert event_dims(sites, {"u": ["feature"]})["W"] == ("feature", "z_dim")


def test_a_dimension_is_never_called_like_a_variable():
    layouts = {"data": Layout(("data",), (), observed=True), "draw": Layout(("chain",), ())}
    arrays = {"posterior": {"draw": np.zeros((4, 2))}, "posterior_predictive": {"data": np.zeros((4, 3))}}
    tables = build_tables(arrays, layouts, row_dim="data", row_names=["a", "b", "c"])
    assert tables.groups["posterior_predictive"]["data"][0] == ("chain", "draw", "data_dim")
    assert tables.groups["posterior"]["draw"][0] == ("chain", "draw", "chain_dim")
    assert list(tables.coords["data_dim"]) == ["a", "b", "c"]


def test_one_name_for_two_lengths_is_refused():
    layouts = {"a": Layout(("p",)), "b": Layout((), (3,))}
    arrays = {"posterior": {"a": np.zeros((4, 2)), "b": np.zeros((4, 3))}}
    with pytest.raises(SettingError, match="'p' has 2 entries in one site and 3 in another"):
        build_tables(arrays, layouts, dims={"b": ["p"]})
