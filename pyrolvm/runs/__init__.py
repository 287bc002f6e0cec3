"""What a run adds to a saved fit: the recipe of its data, its model by name, its folder, its notes.

Shell and report stand on this room, and it knows neither. From Python:

```python
from pyrolvm.runs import Preparation, Source, open_run

prepared = Preparation(standardise=True, validation=0.1).apply(Source("iris"))
fitted = pyrolvm.fit(model, prepared.train, validation=prepared.held_out)
fitted.save("run", {"data": prepared.record})  # `pyrolvm report run` reads the same data again
```
"""

from pyrolvm.runs.folder import RunFolder
from pyrolvm.runs.named import NamedModel, described, find_model
from pyrolvm.runs.recipe import Preparation, Prepared, Recipe
from pyrolvm.runs.saved import SavedRun, add_evidence, open_run
from pyrolvm.runs.source import Source

__all__ = [
    "NamedModel",
    "Preparation",
    "Prepared",
    "Recipe",
    "RunFolder",
    "SavedRun",
    "Source",
    "add_evidence",
    "described",
    "find_model",
    "open_run",
]
