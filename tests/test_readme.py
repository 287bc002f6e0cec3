"""The README's Python runs as it stands, with fewer steps."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("index", range(2), ids=["a model and its guide", "from a script"])
def test_the_examples_run(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"num_steps=\d+", "num_steps=30", BLOCKS[index])
    names: dict = {}
    exec(compile(code, f"README block {index}", "exec"), names)
    assert len(names["fitted"].history) == 30


def test_there_are_the_blocks_that_this_runs():
    assert len(BLOCKS) == 3
    assert "pyrolvm.fit(model, faithful" in BLOCKS[0]
    assert "pyrolvm.load(" in BLOCKS[1]
