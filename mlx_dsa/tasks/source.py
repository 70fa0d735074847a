"""Python as it is written: the standard library's files, with what stands where in them.

A quarter of the files is for evaluation: those whose path, relative to the library's folder and with
strokes between its parts, has a CRC-32 that 4 divides. The recipes train on others alone.
"""

from __future__ import annotations

import ast
import bisect
import functools
import re
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .facts import is_correct

# Installed packages, tests, tables: no code that the library's authors wrote to be read.
_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__",
}  # fmt: skip
_LONGEST = 40  # characters of a value that is asked for


@dataclass(frozen=True)
class Gap:
    """A place between two statements: before line `line`, which `blank` empty lines are before.

    The statements are those of a "module", a "class" or a "function".
    """

    line: int
    blank: int
    indent: str
    scope: str


@dataclass(frozen=True)
class Definition:
    """What a name is given in the code, as a question may call it: lines `start` to `stop`."""

    what: str
    value: str
    start: int
    stop: int
    pattern: str  # what must stand once in a window for the question to have one answer


@dataclass(frozen=True)
class Function:
    """A function without a docstring: from its `def` in line `start`, its first two body lines."""

    name: str
    body: tuple[str, ...]
    start: int
    stop: int

    @property
    def pattern(self) -> str:
        """What must stand once in a window for the question to have one answer."""
        return rf"\bdef {self.name}\("


class Source:
    """The lines of many files, one file after the other, each after a comment with its path.

    Args:
        files (list of (str, str)): paths and texts; what does not parse is left out.

    Attributes:
        lines (list of str): without line ends.
        files (list of int): after which line each file ends.
        gaps (list of Gap), definitions (list of Definition), functions (list of Function):
            in the order of their lines.
    """

    def __init__(self, files: Iterable[tuple[str, str]]) -> None:
        self.lines: list[str] = []
        self.files: list[int] = []
        self.gaps: list[Gap] = []
        self.definitions: list[Definition] = []
        self.functions: list[Function] = []
        for path, text in files:
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue
            self._file = text.splitlines()
            if text.count("\n") not in (len(self._file), len(self._file) - 1):
                continue  # a form feed and its like end a line for Python's texts, not for its parser
            self.lines += ["", f"# {path}"]
            self._first = len(self.lines) - 1  # parsers count lines from 1
            self._body(tree.body, "module")
            self.lines += [line.rstrip() for line in self._file]
            self.files.append(len(self.lines))
        self.definitions.sort(key=lambda x: x.start)
        self.functions.sort(key=lambda x: x.start)
        self.gaps.sort(key=lambda gap: gap.line)

    def within(self, name: str, start: int, stop: int) -> list[Any]:
        """Return the gaps, definitions or functions that lie in lines `start` to `stop`."""
        found = getattr(self, name)
        key = (lambda x: x.line) if name == "gaps" else (lambda x: x.start)
        some = found[bisect.bisect_left(found, start, key=key) : bisect.bisect_left(found, stop, key=key)]
        return some if name == "gaps" else [x for x in some if x.stop <= stop]

    def _body(self, body: Sequence[ast.stmt], scope: str) -> None:
        for before, node in zip(body, body[1:]):
            last = at = _last(before)
            if last >= _begins(node) or before.col_offset != node.col_offset:
                continue  # no lines of their own
            while not self._file[at].strip():
                at += 1
            indent = " " * node.col_offset
            self.gaps.append(Gap(self._first + at + 1, at - last, indent, scope))
        for node in body:
            if isinstance(node, ast.ClassDef):
                self._body(node.body, "class")
            elif isinstance(node, ast.FunctionDef):
                self._defaults(node)
                self._function(node)
                self._body(node.body, "function")
            elif scope != "function" and isinstance(node, ast.Assign):
                self._constant(node, scope)

    def _constant(self, node: ast.Assign, scope: str) -> None:
        target = node.targets[0]
        if len(node.targets) > 1 or not isinstance(target, ast.Name) or target.id.startswith("__"):
            return
        value = _value(node.value)
        if value:
            kind = "constant" if scope == "module" else "class attribute"
            pattern = rf"(?m)^ *{target.id} *="
            self._define(f"the {kind} `{target.id}`", value, node.lineno, _last(node), pattern)
        elif isinstance(node.value, ast.Dict):
            for key, entry in zip(node.value.keys, node.value.values):
                value = _value(key) and _value(entry)
                if key and value:
                    what = f"the entry {ast.unparse(key)} of `{target.id}`"
                    pattern = re.escape(ast.unparse(key))
                    self._define(what, value, key.lineno, _last(entry), pattern)

    def _defaults(self, node: ast.FunctionDef) -> None:
        given = node.args.posonlyargs + node.args.args
        pairs: list[tuple[ast.arg, ast.expr | None]] = list(
            zip(given[len(given) - len(node.args.defaults) :], node.args.defaults)
        )
        pairs += zip(node.args.kwonlyargs, node.args.kw_defaults)
        for argument, default in pairs:
            value = _value(default)
            if default and value:
                what = f"the default of parameter `{argument.arg}` of function `{node.name}`"
                self._define(what, value, node.lineno, _last(default), rf"\bdef {node.name}\(")

    def _define(self, what: str, value: str, start: int, stop: int, pattern: str) -> None:
        if is_correct(what, value):
            return  # whoever repeats the question answers it
        if not is_correct("\n".join(self._file[start - 1 : stop]), value):
            return  # it is written otherwise, as 0o666: whoever quotes the code would be wrong
        definition = Definition(what, value, self._first + start, self._first + stop + 1, pattern)
        self.definitions.append(definition)

    def _function(self, node: ast.FunctionDef) -> None:
        first = node.body[0].lineno
        body = tuple(line.strip() for line in self._file[first - 1 : first + 1])
        if (
            ast.get_docstring(node) is None
            and _last(node) > first
            and not node.name.startswith("__")
            and all(len(line) >= 8 for line in body)
        ):
            found = Function(node.name, body, self._first + node.lineno, self._first + first + 2)
            self.functions.append(found)


def _begins(node: ast.stmt) -> int:
    """Return the first line of a statement, its decorators among them."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def _last(node: ast.stmt | ast.expr) -> int:
    """Return the last line of a statement or expression."""
    return node.end_lineno or node.lineno


def _value(node: ast.expr | None) -> str | None:
    """Return a constant as text where it is one that nobody guesses, else ``None``."""
    if not isinstance(node, ast.Constant) or isinstance(node.value, (bool, bytes)):
        return None
    value = node.value
    if isinstance(value, str):
        return value if 2 <= len(value) <= _LONGEST and re.fullmatch(r"\w(.*\w)?", value) else None
    return repr(value) if isinstance(value, (int, float)) and abs(value) >= 10 else None


@functools.lru_cache(maxsize=1)
def read_source(folder: Path | None = None) -> Source:
    """Return the files that are for evaluation.

    Args:
        folder (Path): the library. Default: ``None``, the running Python's.

    Raises:
        ValueError: if it has no files to read.
    """
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    files = []
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder).as_posix()
        if _SKIPPED.isdisjoint(path.split("/")) and zlib.crc32(path.encode()) % 4 == 0:
            text = file.read_bytes()
            if text.isascii():
                files.append((path, text.decode().replace("\r\n", "\n").expandtabs(8)))
    source = Source(files)
    if not source.lines:
        raise ValueError(f"[read_source] {folder} holds no source of Python's standard library.")
    return source
