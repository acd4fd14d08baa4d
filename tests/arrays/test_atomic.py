"""Names are taken by what is complete, and by nothing else."""

from __future__ import annotations

import pytest

from ncbatch.arrays.atomic import replacing, take_name


def make_folder(path, text):
    path.mkdir()
    (path / "inside").write_text(text)


@pytest.mark.parametrize("before", [False, True])
def test_a_file_takes_the_name_when_it_is_complete(tmp_path, before):
    path = tmp_path / "state.npz"
    if before:
        path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.exists() == before
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [False, True])
def test_a_folder_takes_the_name_when_it_is_complete(tmp_path, before):
    path = tmp_path / "results.zarr"
    if before:
        make_folder(path, "old")
    with replacing(path) as temporary:
        make_folder(temporary, "new")
    assert (path / "inside").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, error, folder):
    path = tmp_path / "kept"
    path.write_text("old")

    def write_half():
        with replacing(path) as temporary:
            make_folder(temporary, "half") if folder else temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_a_folder_takes_a_name_over_leftovers_of_a_kill(tmp_path):
    folder, target, aside = (tmp_path / name for name in ("new", "target", "aside"))
    for path in (folder, target, aside):
        make_folder(path, path.name)
    take_name(folder, target, aside)
    assert (target / "inside").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
