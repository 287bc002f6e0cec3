"""The recipe of a run's data: the same data again, and other data read like them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import pyrolvm
from pyrolvm import DataError, SettingError
from pyrolvm.data import load_dataset
from pyrolvm.runs import Preparation, Recipe, Source


def test_the_same_data_are_read_again():
    prepared = Preparation(standardise=True, validation=0.2, split_seed=3).apply(Source("iris"))
    again = Recipe(json.loads(json.dumps(prepared.record))).read_again()
    assert np.array_equal(again.train.values, prepared.train.values)
    assert np.array_equal(again.held_out.values, prepared.held_out.values)


def test_script_and_recipe_hold_out_the_same_rows():
    x = torch.arange(40.0).reshape(20, 2)
    prepared = Preparation(validation=0.25, split_seed=7).apply(
        Source("iris"), pyrolvm.data.Dataset(x.numpy())
    )
    from pyrolvm.data.plan import split_rows

    train, held_out = split_rows(20, 0.25, 7)
    assert np.array_equal(prepared.train.values, x[train].numpy())
    assert np.array_equal(prepared.held_out.values, x[held_out].numpy())


def test_transforms_are_undone_and_their_scale_is_known():
    prepared = Preparation(standardise=True).apply(Source("iris"))
    recipe, x = Recipe(prepared.record), load_dataset("iris").values
    assert np.allclose(recipe.undo(prepared.train.values), x, atol=1e-5)
    assert np.allclose(recipe.unit(4), x.std(0))
    assert recipe.log_scale(4) == pytest.approx(np.log(x.std(0)).sum())


def test_changed_data_are_not_taken_for_those_of_the_run(tmp_path):
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(9, 2)), columns=["a", "b"])
    frame.to_csv(tmp_path / "x.csv", index=False)
    record = Preparation().apply(Source(str(tmp_path / "x.csv"))).record
    Recipe(record).read_again()
    (frame + 1).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(DataError, match="are not those"):
        Recipe(record).read_again()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"binarise": True, "threshold": float("nan")}, "threshold=nan divides no values"),
        ({"binarise": True, "threshold": float("inf")}, "threshold=inf divides no values"),
        ({"validation": float("nan")}, "validation=nan of 150 rows"),
        ({"validation": 1.0}, "give a share between 0 and 1"),
        ({"split_seed": -1}, "split_seed must be a whole number of at least 0"),
        ({"threshold": 1.0}, "give both"),
        ({"standardise": True, "binarise": True}, "exclude each other"),
    ],
)
def test_a_preparation_that_cannot_be_is_refused(options, said):
    with pytest.raises(SettingError, match=said):
        Preparation(**options).apply(Source("iris"))


def test_a_column_is_taken_once():
    with pytest.raises(DataError, match="is chosen twice"):
        Source("iris", columns=["petal length (cm)", "petal length (cm)"]).read()
