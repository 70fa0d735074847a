"""Tables over several runs of a suite."""

from .tables import of_dense, over_attention, percent


def overview(spec, results):
    """Return a table of several runs, a cell for each run and policy, as a header and rows.

    Args:
        spec (dict): "columns", their names, and "rows", from a name to a cell for each column: a run
            and the label of a policy in it, or the K of a selection.
        results (dict): from runs to their results.
    """
    rows = [[name, *(_cell(results[run], label) for run, label in cells)] for name, cells in spec["rows"].items()]
    return ["", *spec["columns"]], rows


def _cell(result, label):
    """Return what a policy reaches of what the dense model does."""
    if result["kind"] == "retrieval":
        return "; worst ".join(over_attention(result, "index", label))
    pairs = [p for p in result["pairs"] if p["policy"] == label]
    if result["kind"] == "ppl":
        pair = next(p for p in pairs if p["against"] == "dense")
        ends = (f"{100 * (pair[k] - 1):+.1f}" for k in ("ratio_low", "ratio_high") if pair[k] is not None)
        return f"{100 * (pair['ratio'] - 1):+.1f}% [{', '.join(ends) or 'one text'}]"
    rows = {r["policy"]: r for r in result["rows"] if r.get("depth") is None}
    if label == "dense":
        return percent(rows["dense"]["value"], rows["dense"]["low"], rows["dense"]["high"])
    pair = next((p for p in pairs if p["against"] == "dense"), None)
    return f"{of_dense(pair)}; {percent(rows[label]['value'])} of all"
