"""A file is replaced as a whole or not at all; what is ours is told from what is a user's."""

import os
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dsa.files import HeldFile, is_dropping, is_part, replacing

ROOT = Path(__file__).resolve().parents[1]
MARK = b"ours\n"


@contextmanager
def child(code, *arguments):
    """Run code until it has printed a line; end it with SIGKILL."""
    command = [sys.executable, "-c", f"import sys, time\nfrom mlx_dsa.files import *\n{code}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, env=environment)
    with process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


WRITE = """
with replacing(sys.argv[1]) as part:
    part.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
HOLD = """
held = HeldFile(sys.argv[1], b"ours\\n")
print("ready", flush=True)
time.sleep(60)
"""


def test_the_new_file_is_there_at_the_end_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.suffix == ".json"
        assert str(os.getpid()) in part.name and is_part(part.name)
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


def test_the_file_has_the_rights_that_any_new_file_has(tmp_path):
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "a.json") as part:
        part.write_text("new")
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "a.json")]
    assert modes[0] == modes[1]


def test_a_name_as_long_as_a_name_can_be(tmp_path):
    path = tmp_path / ("ä" * 125 + ".json")
    with replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"


def test_what_a_killed_writer_left_goes_at_the_next_write(tmp_path):
    with child(WRITE, str(tmp_path / "a.kv")):
        pass
    (left,) = os.listdir(tmp_path)
    assert is_part(left)
    with replacing(tmp_path / "other.json") as part:
        part.write_text("new")
    assert os.listdir(tmp_path) == ["other.json"]


def test_what_is_being_written_stays(tmp_path):
    with child(WRITE, str(tmp_path / "a.kv")):
        (theirs,) = os.listdir(tmp_path)
        for path in (tmp_path / "a.kv", tmp_path / "other.json"):
            with replacing(path) as one, replacing(path) as two:
                one.write_text("1")
                two.write_text("2")
                assert sorted(os.listdir(tmp_path)) == sorted(
                    {theirs, one.name, two.name, *(p.name for p in tmp_path.glob("a.kv"))}
                )
            assert path.read_text() == "1"  # the last that is ready
        assert (tmp_path / theirs).read_text() == "half"


def test_a_writer_of_mlx_keeps_the_lock(tmp_path):
    with replacing(tmp_path / "a.kv", suffix=".safetensors") as part:
        before = part.stat().st_ino
        mx.save_safetensors(str(part), {"a": mx.zeros(3)})
        assert part.stat().st_ino == before


def test_files_of_the_user_stay(tmp_path):
    names = "a.part.json a.4242.part.json a.part a.mlx-dsa-12.part.kv .mlx-dsa".split()
    for name in names:
        (tmp_path / name).write_text("mine")
    for path in ("a.json", "a.kv"):
        with replacing(tmp_path / path) as part:
            part.write_text("new")
    for name in names:
        assert (tmp_path / name).read_text() == "mine"


def test_a_held_file_is_there_until_it_is_released(tmp_path):
    path = tmp_path / "cold"
    held = HeldFile(path, MARK)
    assert path.read_bytes() == MARK
    with pytest.raises(BlockingIOError):
        HeldFile(path, MARK)
    path.open("ab").write(b"rows")
    held.release()
    assert not path.exists()
    HeldFile(path, MARK).release()
    assert not path.exists()


def test_what_a_killed_holder_left_gives_way(tmp_path):
    path = tmp_path / "cold"
    with child(HOLD, str(path)):
        with pytest.raises(BlockingIOError):
            HeldFile(path, MARK)
        assert path.read_bytes() == MARK
        path.open("ab").write(b"rows")
    held = HeldFile(path, MARK)
    assert path.read_bytes() == MARK
    held.release()
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"mine", MARK[:-1], b"x" + MARK])
def test_a_file_that_is_not_ours_is_never_taken(tmp_path, content):
    path = tmp_path / "cold"
    path.write_bytes(content)
    with pytest.raises(FileExistsError):
        HeldFile(path, MARK)
    assert path.read_bytes() == content


def test_no_folder_pipe_or_link_is_taken(tmp_path):
    (tmp_path / "left").write_bytes(MARK)
    (tmp_path / "link").symlink_to(tmp_path / "left")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "nowhere", "folder", "pipe"):
        with pytest.raises(FileExistsError):
            HeldFile(tmp_path / name, MARK)
    assert (tmp_path / "left").read_bytes() == MARK and len(os.listdir(tmp_path)) == 5


def test_another_file_in_its_place_is_not_deleted(tmp_path):
    path = tmp_path / "cold"
    held = HeldFile(path, MARK)
    path.unlink()
    path.write_text("mine")
    held.release()
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "thumbs.db", "desktop.ini", "._a.txt"])
def test_what_systems_leave_in_folders_is_no_content(name):
    assert is_dropping(name)
    assert not is_dropping("my " + name)


@pytest.mark.parametrize("name", [".env", "notes.txt", "checkpoint.safetensors", "_a", "DS_Store"])
def test_what_a_user_put_there_is(name):
    assert not is_dropping(name)
