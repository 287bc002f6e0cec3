"""The folder that a run is written to: new, empty or its own; nothing of others is touched."""

import json

import pytest

from pyrolvm import RunFolderError, SettingError
from pyrolvm.runs import RunFolder


def folder(path, **options):
    return RunFolder(path, {"model": "A"}, "pyrolvm fit ...", **options)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(
            RunFolderError, match=r"holds other files \(thesis\.tex\): name a new or an empty folder"
        ):
            folder(tmp_path, **options).check()


def test_new_and_empty_folders_are_taken_and_nothing_is_made_by_looking(tmp_path):
    folder(tmp_path).check()
    folder(tmp_path / "a" / "b").check()
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_ones_own_is_known_with_notes_beside_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    folder(tmp_path, overwrite=True).check()
    with pytest.raises(RunFolderError, match="holds a run already"):
        folder(tmp_path).check()


def test_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(RunFolderError, match="holds no run to resume: leave resume out"):
        folder(tmp_path / "new", resume=True).check()
    with pytest.raises(SettingError, match="choose one"):
        folder(tmp_path, resume=True, overwrite=True).check()


def test_another_run_is_not_resumed(tmp_path):
    folder(tmp_path).begin()
    folder(tmp_path, resume=True).check()
    other = RunFolder(tmp_path, {"model": "B"}, "", resume=True)
    with pytest.raises(RunFolderError, match="begun with model='A', this command has 'B'"):
        other.check()


def test_what_was_begun_in_vain_is_withdrawn(tmp_path):
    run = folder(tmp_path / "run")
    run.begin()
    assert json.loads((tmp_path / "run" / "checkpoint" / "run.json").read_text())["identity"] == {
        "model": "A"
    }
    run.withdraw()
    assert list(tmp_path.iterdir()) == []
