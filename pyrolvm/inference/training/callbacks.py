"""Callbacks for `fit(callbacks=...)`: records that other programs can follow during a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolvm.errors import SettingError
from pyrolvm.files import write_atomically

if TYPE_CHECKING:
    from pyrolvm.inference.training.loop import Report


class JSONLines:
    """The history as a file with one JSON object per step, its columns as keys, NaN as null.

    Resuming rewrites the file, so each step appears once.

    Parameters
    ----------
    path : str or Path
        The file; an existing one is replaced at the first call.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._written = Path(path), 0

    def __call__(self, report: Report) -> None:
        """Write the steps since the last chunk."""
        lines = [json.dumps(row) + "\n" for row in report.history.rows(after=self._written)]
        if self._written:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        else:
            write_atomically(self.path, lambda p: p.write_text("".join(lines), encoding="utf-8"))
        self._written = report.step


class TensorBoard:
    """Write the history's columns as TensorBoard scalars; needs the package `tensorboard`.

    Resuming rewrites the record, so each step appears once.

    Parameters
    ----------
    folder : str or Path
        The log directory.

    Raises
    ------
    SettingError
        The package `tensorboard` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SettingError(
                "TensorBoard records need the package tensorboard: pip install tensorboard"
            ) from None
        # a resumed run writes its whole history again, so drop what the folder shows
        self._writer: Any = SummaryWriter(str(folder), purge_step=0)
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
