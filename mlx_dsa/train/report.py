"""What of a source is left out, or not learnt from as it was meant, by kind and place."""

from __future__ import annotations

_SHOWN = 3  # places of a kind that are named
_LONGEST = 160  # characters of a detail


class Unusable(Exception):
    """A row that cannot be learnt from.

    Args:
        kind (str): What all such rows are, as in "2 without a reply".
        detail (str): What this one is, or who says so. Default: ``""``.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Report:
    """Count the rows of a source as they are read, and what becomes of them."""

    def __init__(self):
        self.n_rows = 0
        self._row = 0
        self._left_out: dict[str, _Kind] = {}
        self._unmarked = _Kind("row")

    def begin(self, row: int):
        """Note that the row of this number is read; what follows is about it."""
        self.n_rows += 1
        self._row = row

    def leave_out(self, kind: str, detail: str = "", *, noun: str = "row"):
        """Count this row as left out; ``noun`` is what it is numbered as."""
        self._left_out.setdefault(kind, _Kind(noun)).add(self._row, detail)

    def learn_without_replies(self):
        """Count this row as a chat whose replies have no place that is known."""
        self._unmarked.add(self._row)

    def __str__(self) -> str:
        """Say what was left out in one line; nothing where nothing was."""
        parts = []
        if self._left_out:
            total = sum(kind.count for kind in self._left_out.values())
            kinds = ", ".join(f"{k.count:,} {name} {k}" for name, k in self._left_out.items())
            parts.append(f"Left out {total:,} of {self.n_rows:,} rows: {kinds}.")
        if n := self._unmarked.count:
            parts.append(
                f"The chat template does not show where the replies are in {n:,} of "
                f"{self.n_rows:,} rows {self._unmarked}: these are learnt from as plain text."
            )
        return " ".join(parts)


class _Kind:
    """How often something was met, and where first."""

    def __init__(self, noun: str):
        self.noun, self.count, self.detail = noun, 0, ""
        self.places: list[int] = []

    def add(self, place: int, detail: str = ""):
        self.count += 1
        self.detail = self.detail or detail[:_LONGEST]
        if len(self.places) < _SHOWN:
            self.places.append(place)

    def __str__(self) -> str:
        noun = self.noun if self.count == 1 else self.noun + "s"
        more = ", ..." if self.count > _SHOWN else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"({noun} {', '.join(map(str, self.places))}{more}{detail})"
