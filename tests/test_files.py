"""Where what can be made again is kept."""

from pathlib import Path

from pyrolvm.files import cache_folder


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("PYROLVM_CACHE", raising=False)
    assert cache_folder().is_relative_to(Path.home())
    monkeypatch.setenv("PYROLVM_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
