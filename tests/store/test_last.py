"""A folder remembers the run it used last."""

from pathlib import Path

import pytest

from flatq_cli.errors import UsageError
from flatq_cli.store.last import last_run, remember_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_run_used_last_is_found_again(folder):
    for name in ("a", "b"):
        (folder / "runs" / name).mkdir(parents=True)
        remember_run(Path("runs") / name)
    assert last_run() == Path("runs/b")
    assert (folder / "runs" / ".last").read_text() == "runs/b\n"


def test_a_run_inside_the_folder_moves_with_it(folder, tmp_path_factory, monkeypatch):
    (folder / "runs" / "a").mkdir(parents=True)
    remember_run(folder / "runs" / "a")
    moved = tmp_path_factory.mktemp("moved") / "folder"
    folder.rename(moved)
    monkeypatch.chdir(moved)
    assert last_run() == Path("runs/a")


def test_a_run_elsewhere_is_remembered_by_its_absolute_path(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "größer"
    elsewhere.mkdir()
    remember_run(elsewhere)
    assert last_run() == elsewhere.resolve()


def test_none_used_or_gone_says_what_to_do(folder):
    with pytest.raises(UsageError, match=r"no run was used in this folder yet: .*flatq calibrate"):
        last_run()
    (folder / "runs" / "a").mkdir(parents=True)
    remember_run(Path("runs/a"))
    (folder / "runs" / "a").rmdir()
    with pytest.raises(UsageError, match="runs/a, the run this folder used last, is gone"):
        last_run()


def test_a_folder_that_cannot_remember_does_not_stop_the_work(folder):
    (folder / "runs").write_text("a file in the way")
    remember_run(folder / "elsewhere")
    with pytest.raises(UsageError, match="no run was used"):
        last_run()
