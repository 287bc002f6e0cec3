"""Callbacks for `fit(callbacks=...)`: records that other programs can follow while a run is going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolvm.errors import SettingError

if TYPE_CHECKING:
    from pyrolvm.inference.training import Report


class JSONLines:
    """Append one JSON object per step to a file: the columns of the history, NaN as null."""

    def __init__(self, path: str | Path) -> None:
        self.path, self._written = Path(path), 0

    def __call__(self, report: Report) -> None:
        """Write the steps since the last chunk."""
        new = list(report.history.rows(after=self._written))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        self._written = report.step


class TensorBoard:
    """Write the history's columns as TensorBoard scalars; needs the package `tensorboard`."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SettingError(
                "TensorBoard records need the package tensorboard: pip install tensorboard"
            ) from None
        self._writer: Any = SummaryWriter(str(folder))
        self._written = 0

    def __call__(self, report: Report) -> None:
        """Write the steps since the last chunk."""
        for row in report.history.rows(after=self._written):
            step = row.pop("step")
            for name, value in row.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._written = report.step
