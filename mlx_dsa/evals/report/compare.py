"""Two result files, compared in pairs: the same items, or nothing."""

from __future__ import annotations

from ..evaluator import Result, Row, evaluator_of
from .stats import bootstrap, paired_proportions


def compare(first: Result, second: Result) -> list[Row]:
    """Compare two results of the same items.

    Policies of the same label are compared. Where the results share none and each has one, these
    two are.

    Args:
        first, second (dict): from `read_result`.

    Returns:
        list of dict: one a policy and metric, with the difference first - second.

    Raises:
        ValueError: if they are of different kinds, share no policy, or are about different items.
    """
    kind = first["kind"]
    if second["kind"] != kind:
        raise ValueError(f"[compare] the results are of different kinds: {kind} and {second['kind']}.")
    evaluator = evaluator_of(kind)
    if not (evaluator.metrics or evaluator.difference):
        raise ValueError(f"[compare] results of kind {kind} have no items to pair.")
    pairs = []
    for name, other in _policies(first, second):
        left, right = _items(first, name), _items(second, other)
        _check(left, right)
        label = {"policy": name, "against": other}
        if evaluator.difference:
            pairs.append({**label, **evaluator.difference(left, right)})
        for metric in evaluator.metrics:
            values = [[r[metric] for r in side.values()] for side in (left, right)]
            pairs.append({**label, "metric": metric, **paired_proportions(*values)})
    return pairs


def _policies(first: Result, second: Result) -> list[tuple[str, str]]:
    names = [list(dict.fromkeys(r["policy"] for r in result["items"])) for result in (first, second)]
    shared = [name for name in names[0] if name in names[1]]
    if shared:
        return [(name, name) for name in shared]
    if len(names[0]) == len(names[1]) == 1:
        return [(names[0][0], names[1][0])]
    raise ValueError(f"[compare] the results share no policy: {', '.join(names[0])} against {', '.join(names[1])}.")


def _items(result: Result, policy: str) -> dict[str, Row]:
    found = {r["item"]: r for r in result["items"] if r["policy"] == policy}
    return dict(sorted(found.items()))


def _check(left: dict[str, Row], right: dict[str, Row]) -> None:
    if left.keys() != right.keys():
        only = sorted(left.keys() ^ right.keys())
        raise ValueError(
            f"[compare] the results are about different items: {len(only)} stand in one of them only, "
            f"such as {only[0]!r}."
        )
    differ = [key for key in left if left[key]["hash"] != right[key]["hash"]]
    if differ:
        raise ValueError(
            f"[compare] the results are about different items: {len(differ)} of the same name have another "
            f"text, such as {differ[0]!r}."
        )


def nll_difference(left: dict[str, Row], right: dict[str, Row]) -> Row:
    """Return how the NLL of the same tokens differs, first - second."""
    counts = [[r["n"] for r in side.values()] for side in (left, right)]
    if counts[0] != counts[1]:
        raise ValueError("[compare] the results score different tokens: their top_k differ.")
    differences = [a["nll"] - b["nll"] for a, b in zip(left.values(), right.values())]
    mean, low, high = bootstrap(differences, counts[0])
    return {"metric": "NLL", "n": sum(counts[0]), "difference": mean, "low": low, "high": high}
