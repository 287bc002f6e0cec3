"""Which data a fitted model answers about: as many arguments, the same columns, and rows that its guide knows."""

from __future__ import annotations

import inspect
from typing import Any

from pyrolvm.data.batch import Batch
from pyrolvm.errors import DataError, SettingError
from pyrolvm.inference.posterior.record import Record
from pyrolvm.inference.posterior.suiting import carries, suited
from pyrolvm.inference.program.pair import Pair
from pyrolvm.plates import DATA_PLATE


def batch_of(fitted: Record, x: Any) -> Batch:
    """As `FittedModel.batch`."""
    data = suited(fitted.program, x, fitted.call)
    _check_number(fitted, data)
    plate = fitted.structure.data_plate
    if plate is not None:
        data.check_rows()
    check_columns(fitted, data)
    _check_rows(fitted, data)
    # row numbers count within the fitted data where the plate carries N, else within what is asked about
    own = plate is None or plate.full_size == plate.size
    rows = len(data.indices)
    return data if data.rows is not None else data.of(rows if own else max(fitted.num_rows, rows))


def is_training_data(fitted: Record, data: Batch) -> bool:
    """Whether `data` holds the rows that were fitted, in their order."""
    return data.num_rows == fitted.num_rows and data.fingerprint() == fitted.settings.get("data")


def is_whole(fitted: Record, pair: Pair) -> bool:
    """Whether a pair holds the data of the fit, of which the posterior of what all data share is that."""
    if fitted.structure.data_plate is None:
        return True
    same = fitted.settings.get("data") in (None, pair.batch.fingerprint())
    return same and pair.num_rows == fitted.num_rows


def check_whole(fitted: Record, pair: Pair, what: str) -> Pair:
    """`pair`; raises `SettingError` if it is to be weighed and holds other data than the fit's."""
    shared = fitted.structure.global_latents
    if shared and not is_whole(fitted, pair):
        raise SettingError(
            f"{what} weighs '{shared[0].name}' by the data, which all of them share: pass the {fitted.num_rows} rows "
            f"that were fitted, not {pair.num_rows} others"
        )
    return pair


def check_columns(fitted: Record, data: Batch) -> None:
    """Refuse columns of other names than those that were fitted."""
    if fitted.columns and data.columns and data.columns != fitted.columns:
        raise DataError(
            f"the columns {data.columns} are not those the model was fitted to: pass x[{fitted.columns}]"
        )


def num_carrying(fitted: Record) -> int:
    """Arguments of the program that hold rows."""
    call = fitted.call
    if call is None:
        return _num_arguments(fitted)
    return sum(carries(call, key) for key in (*range(len(call.args)), *call.kwargs))


def _num_arguments(fitted: Record) -> int:
    if fitted.example is not None:
        return len(fitted.example.args) + len(fitted.example.kwargs)
    known = fitted.arguments or {}
    return len(known.get("positional", ())) + len(known.get("keyword", ()))


def _check_number(fitted: Record, data: Batch) -> None:
    """Refuse fewer arguments than the fit had: a label that is left out is not the label of nothing."""
    if len(data.args) + len(data.kwargs) < (wanted := _num_arguments(fitted)):
        names = ", ".join(list(inspect.signature(fitted.program.model).parameters)[:wanted])
        raise DataError(f"the program was fitted to {wanted} arguments: pass all of them, ({names})")


def _check_rows(fitted: Record, data: Batch) -> None:
    """Refuse another number of rows where the program takes its data whole, and rows without parameters."""
    structure, rows = fitted.structure, fitted.num_rows
    if not structure.takes_any_rows and data.num_rows != rows and data.num_rows:
        if structure.data_plate is not None and structure.data_plate.name == DATA_PLATE:
            raise DataError(
                f"the program runs on its {rows} rows alone, not on {data.num_rows}: something of as many rows that is "
                "no argument stands in model or guide; pass it to both as an argument"
            )
        raise DataError(
            f"the program was fitted to {rows} rows as a whole, so it cannot take {data.num_rows}: declare the rows "
            "by `with pyrolvm.data_plate(x):` if they are independent data"
        )
    new = data.num_rows != rows or (structure.row_tables and not is_training_data(fitted, data))
    if structure.per_datum and data.rows is None and new:
        raise DataError(
            f"the guide has parameters for each of the {rows} training rows ('{structure.per_datum[0]}') and none for "
            "new ones: pass the training data, ask fitted.refine(x) about others, or fit an amortised guide"
        )
