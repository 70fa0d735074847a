"""A file is replaced as a whole or not at all."""

import os

import pytest

from mlx_dsa.files import is_dropping, replacing


@pytest.mark.parametrize("shared", [False, True])
def test_the_new_file_is_there_at_the_end_alone(tmp_path, shared):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path, shared=shared) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.suffix == ".json"
        assert (str(os.getpid()) in part.name) == shared
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.kv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with replacing(path, suffix=".safetensors") as part:
            part.write_text("half")
            assert part.suffix == ".safetensors"
            raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.kv"]


def test_what_a_kill_left_is_written_over(tmp_path):
    with replacing(tmp_path / "a.json") as part:
        left = part
        part.write_text("new")
    left.write_text("left by a kill")
    with replacing(tmp_path / "a.json") as part:
        part.write_text("newer")
    assert (tmp_path / "a.json").read_text() == "newer"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "thumbs.db", "desktop.ini", "._a.txt"])
def test_what_systems_leave_in_folders_is_no_content(name):
    assert is_dropping(name)
    assert not is_dropping("my " + name)


@pytest.mark.parametrize("name", [".env", "notes.txt", "checkpoint.safetensors", "_a", "DS_Store"])
def test_what_a_user_put_there_is(name):
    assert not is_dropping(name)
