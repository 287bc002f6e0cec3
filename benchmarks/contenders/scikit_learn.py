"""scikit-learn's own fit of a mixture: coordinate ascent, a pass over all data for each step."""

from __future__ import annotations

import warnings

from benchmarks.contenders.base import Runner, UnavailableError, available
from benchmarks.rows import Case


class ScikitLearn(Runner):
    """One iteration of an estimator with `max_iter` and `warm_start`, by a tolerance that ends none.

    An iteration is no step of the gradient, and what scikit-learn reports is another bound (up to a constant), so
    that bounds are not compared: the row says what a pass over the data costs, not which gets there first.
    """

    title = "scikit-learn"
    has_bounds = False

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if case.device.type != "cpu":
            raise UnavailableError("only on a CPU")
        self._model = available(case.row.sklearn)().set_params(warm_start=True, tol=0.0)
        self._x = case.data[0].numpy()

    def run(self, first: int, num_steps: int) -> None:
        """As `Runner.run`, without bounds."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged
            self._model.set_params(max_iter=num_steps).fit(self._x)
