"""Shared by all tests: load MLX as the program does, and keep runs repeatable."""

import os
import signal

# A test run in the background has signals ignored that tests send, and so would its children.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# Small products wait longer for a second thread of OpenBLAS than they take.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx_dsa  # noqa: E402, F401, I001  (before mlx.core: it loads OpenBLAS)
import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402


# Files that take longest: make test-fast leaves them out.
_SLOW = """
auto bench cli compact compact_commands compact_reference cuts ending evals_alone evals_board evals_bundled
evals_code evals_coverage evals_needle evals_real evals_runs evals_stem eviction families forgetting
identities kernels packaging retention rules saved select_rules selection serve_page
serve_page_access serve_page_documents servers stream terminal tiered tiered_recall
tiered_stream train train_retention unfinished
""".split()


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="leave the files out that take longest")


def pytest_ignore_collect(collection_path, config):
    """Leave a slow file out where --fast is given; say nothing of others."""
    slow = collection_path.name.removeprefix("test_").removesuffix(".py") in _SLOW
    return True if slow and config.getoption("fast") else None


@pytest.fixture(autouse=True)
def fixed_seed():
    """Start every test from the same random state."""
    mx.random.seed(0)


@pytest.fixture(autouse=True)
def no_crossovers(tmp_path_factory, monkeypatch):
    """Keep what was measured on this machine out of the tests."""
    monkeypatch.setenv("MLX_DSA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
