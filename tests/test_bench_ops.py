"""The timings of single operations: rows, floors, refusals."""

import mlx.core as mx
import pytest

from mlx_dsa.bench import ops
from mlx_dsa.bench.ops import OpsShape, Rates, measure_ops, measure_rates

SHAPE = OpsShape(4, 2, 16, 2, 12, mx.float32)
SIZES = dict(chunk=32, top_k=40, tile_size=16, n_sink=2, n_recent=4, repeats=1, n_layers=2)
NAMES = {"dense", "score", "select", "gather", "sdpa", "attend", "sparse"}


def test_a_row_has_times_floors_and_a_speedup():
    rows = list(measure_ops([80, 128], SHAPE, Rates(1e10, 1e11), **SIZES))
    assert [row["context"] for row in rows] == [80, 128]
    for row in rows:
        assert all(row[name] > row["floor"][name] > 0 for name in NAMES)
        assert row["speedup"] == pytest.approx(row["dense"] / row["sparse"])


def test_floors_grow_with_what_is_read():
    short, long = measure_ops([80, 160], SHAPE, Rates(1e10, 1e11), **SIZES)
    grows = {n: long["floor"][n] / short["floor"][n] for n in ("dense", "score", "attend")}
    # The last chunk sees half of itself: (160 - 16) / (80 - 16) as many pairs.
    assert grows["dense"] == pytest.approx(2.25, rel=0.01)
    assert grows["score"] > 1.8
    assert grows["attend"] == pytest.approx(1, abs=0.5)


def test_rates_are_positive():
    assert all(rate > 0 for rate in measure_rates(mx.float32, 64))


def test_a_context_that_is_not_sparse_is_refused():
    with pytest.raises(ValueError, match="at least 72"):
        next(measure_ops([71], SHAPE, **SIZES))


def test_an_operation_that_fails_stops_no_other(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ops, "select_topk", fails)
    (row,) = measure_ops([80], SHAPE, Rates(1e10, 1e11), **SIZES)
    assert set(row["failed"]) == {"select", "sparse"}
    assert row["select"] is row["sparse"] is row["speedup"] is None
    assert row["failed"]["select"] == "no such instruction"
    assert all(row[name] > 0 for name in NAMES - {"select", "sparse"})
