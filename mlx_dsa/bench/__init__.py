"""What speed and memory sparse attention reaches here, and from where on it pays."""

from .end_to_end import Pass, bench, check_contexts
from .models import BENCH_SHAPES, BenchShape, random_model
from .ops import OpsShape, Rates, bench_ops, measure_ops, measure_rates
from .rows import bench_rows
from .training import TRAINED, bench_training
from .tune import tune

__all__ = [
    "BENCH_SHAPES",
    "BenchShape",
    "OpsShape",
    "Pass",
    "Rates",
    "TRAINED",
    "bench",
    "bench_ops",
    "bench_rows",
    "bench_training",
    "check_contexts",
    "measure_ops",
    "measure_rates",
    "random_model",
    "tune",
]
