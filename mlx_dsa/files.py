"""Files that are written as a whole or not at all, and files that are ours while held."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Its process is in a part's name for whoever finds it; its lock says whether it is written.
_PART = re.compile(r".*\.mlx-dsa-\d+-[0-9a-f]{8}\.part(\.[^.]*)?", re.DOTALL)
# What file managers, network drives and git users leave in folders.
_DROPPINGS = (
    ".ds_store .localized .directory .gitkeep icon\r thumbs.db ehthumbs.db desktop.ini "
    ".spotlight-v100 .fseventsd .trashes"
).split(" ")


def is_dropping(name: str) -> bool:
    """Tell whether a name in a folder is one that nobody put there as content.

    Args:
        name (str): A file's name, without its folder.

    Returns:
        bool: Whether a folder that holds only such files counts as empty.
    """
    return name.lower() in _DROPPINGS or name.startswith(("._", ".nfs"))


@contextmanager
def replacing(path: str | os.PathLike, *, suffix: str | None = None, durable: bool = True) -> Iterator[Path]:
    """Give a file to write to, which at the end replaces another in one step.

    On an error it is removed, and the other stays as it was. What killed processes
    left in the folder is removed too.

    Args:
        path (str or PathLike): The file to replace; its folder must be there.
        suffix (str, optional): Of the file to write to. Default: ``None``, that of ``path``.
        durable (bool): Wait until the disk has it. Without, a killed process loses nothing
          either, but a power failure may leave a file that is not whole. Default: ``True``.

    Yields:
        Path: The file to write to, beside ``path``, of this call alone. It is there
        already, and must be written in place.
    """
    path = Path(path)
    _remove_left_parts(path.parent)
    part, lock = _new_part(path, path.suffix if suffix is None else suffix)
    try:
        yield part
        if durable:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        os.close(lock)


def is_part(name: str) -> bool:
    """Return whether a file of this name is one that :func:`replacing` gave."""
    return _PART.fullmatch(name) is not None


class HeldFile:
    """A new file that belongs to its holder until it is released, which deletes it.

    One that a killed holder left is told by its mark and by a lock that nobody has, and
    gives way. Any other file stays as it is.

    Args:
        path (str or PathLike): The file.
        mark (bytes): What the file begins with; the holder must leave it there.

    Raises:
        FileExistsError: If there is a file that is not ours.
        BlockingIOError: If another holder has it.
        OSError: If it can't be made.
    """

    def __init__(self, path: str | os.PathLike, mark: bytes):
        self._path = Path(path)
        while True:
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                break
            except FileExistsError as error:
                _clear_place(self._path, mark, error)
        # First the lock: what has a mark and no lock was left.
        with suppress(OSError):  # there are file systems without locks
            fcntl.flock(self._file, fcntl.LOCK_EX)
        os.write(self._file, mark)

    def release(self):
        """Delete the file, if it is still this one."""
        if _is_at(self._path, self._file):
            self._path.unlink(missing_ok=True)
        os.close(self._file)


def _clear_place(path: Path, mark: bytes, exists: FileExistsError):
    try:
        _remove_left(path, mark)
    except FileNotFoundError:
        return  # it has just gone
    except BlockingIOError:
        raise
    except OSError:  # a folder, a link, a file of someone else
        raise exists from None


def _remove_left(path: Path, mark: bytes = b""):
    """Delete a file of ours that no process has locked; raise an OSError otherwise."""
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if os.pread(file, len(mark), 0) != mark:
            raise FileExistsError
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, file):
            os.unlink(path)
    finally:
        os.close(file)


def _remove_left_parts(folder: Path):
    with suppress(OSError):  # there are folders that can be written and not listed
        for name in filter(is_part, os.listdir(folder)):
            with suppress(OSError):
                _remove_left(folder / name)


def _new_part(path: Path, suffix: str) -> tuple[Path, int]:
    stem = path.stem[:40]  # a long name has no room for more
    while True:
        owner = f"mlx-dsa-{os.getpid()}-{secrets.token_hex(4)}"
        part = path.with_name(f"{stem}.{owner}.part{suffix}")
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        # Before it had a lock, another process may have taken it for one that was left.
        if _is_at(part, file):
            return part, file
        os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def write_text(path: str | os.PathLike, text: str):
    """Write a file so that the old one or the new one is there, never half of one.

    Args:
        path (str or PathLike): The file; its folder is made.
        text (str): What is to stand in it.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8")
