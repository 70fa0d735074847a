"""What is shipped, and how the code is laid out."""

import ast
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import mlx_dsa
from mlx_dsa import blas, startup

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlx_dsa"

# Imports run from right to left only (docs/design.md, layout).
LAYERS = [
    {"arrays", "blas", "config", "files", "fingerprint", "gguf", "hub", "machine", "plugins", "pictures", "positions",
     "registry", "sealed", "template", "texts", "versions"},
    {"startup", "tasks"},
    {"ops"},
    {"families", "indexer", "indexer_args", "selection", "cache", "checkpoint", "checkpoint_file", "chunks",
     "crossovers", "projections"},
    {"calibrated", "search", "convert"},
    {"rules"},
    {"eviction"},
    {"attention", "batch", "dense"},
    {"patch"},
    {"maker", "reach", "saved", "saved_before"},
    {"unfinished"},
    {"presets"},
    {"train", "calibrate", "evals", "bench", "serve"},
    {"cli"},
]  # fmt: skip
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
ENDS = {"__init__", "__main__"}  # of the package itself: they name everything


def unit(path):
    """Return the part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path):
    """Yield the parts of mlx_dsa that a file imports, and other packages."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _absolute(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from _absolute(node.module)
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [a.name for a in node.names]
            yield from (name.split(".")[0] for name in names)


def _absolute(name):
    parts = name.split(".")
    if parts[0] != "mlx_dsa":
        yield f"{parts[0]} (package)"
    elif len(parts) > 1:
        yield parts[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = unit(path)
    if own in ENDS:
        return
    assert own in RANKS, f"give {own} a place in LAYERS"
    for name in imported_units(path):
        if name in RANKS and name != own:
            assert RANKS[name] <= RANKS[own], f"{own} must not import {name}"
        if name in ("click (package)", "rich (package)", "prompt_toolkit (package)"):
            assert own == "cli", f"{own} must not import {name}"


def test_the_import_check_sees_imports():
    seen = set(imported_units(PACKAGE / "cli" / "session.py"))
    assert {"blas", "patch", "presets", "click (package)"} <= seen


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_public_names():
    for name in (
        "SparseConfig Indexer IndexerArgs load_indexers save_indexers BudgetKVCache "
        "FullKVCache sparse_attention patch_sparse_generate load_preset"
    ).split():
        assert name in mlx_dsa.__all__ and hasattr(mlx_dsa, name)


def test_one_version():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.*)"', text, re.M).group(1) == mlx_dsa.__version__
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", cited, re.M).group(1) == mlx_dsa.__version__


def test_openblas_is_loaded_before_mlx():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    lines = [ast.unparse(node) for node in tree.body]
    first = next(i for i, line in enumerate(lines) if line.startswith("from .cache"))
    assert lines.index("startup.prepare()") < first
    for name in ("startup.py", "blas.py"):
        assert "mlx (package)" not in set(imported_units(PACKAGE / name))


def ask_a_new_process(code, variables):
    names = (*blas._THREADS, *CUDA_SETTINGS)
    environment = {k: v for k, v in os.environ.items() if k not in names}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.split()


CUDA_SETTINGS = {"MLX_CUDA_GRAPH_CACHE_SIZE": "3000"}
if sys.platform != "darwin":
    CUDA_SETTINGS["MLX_MAX_MB_PER_BUFFER"] = "100"


@pytest.mark.parametrize("own", [None, "7"])
@pytest.mark.parametrize("name", CUDA_SETTINGS)
def test_what_the_user_has_set_for_cuda_stays(name, own):
    code = f"import mlx_dsa, os; print(os.environ[{name!r}])"
    assert ask_a_new_process(code, {name: own} if own else {}) == [own or CUDA_SETTINGS[name]]


@pytest.mark.skipif(not blas.preload(), reason="OpenBLAS is not on this machine")
@pytest.mark.parametrize("own", [None, *blas._THREADS])
def test_openblas_has_the_threads_that_the_user_has_set(own):
    """Else one less than there are cores; and no variable is set for other programs."""
    n_cores = len(os.sched_getaffinity(0))
    code = (
        "import ctypes, os; before = dict(os.environ); import mlx_dsa\n"
        "new = {k for k in os.environ if k not in before}\n"
        "threads = ctypes.CDLL('libopenblas.so.0').openblas_get_num_threads()\n"
        "print(threads, *new)"
    )
    variables = {own: str(n_cores)} if own else {}
    threads, *new = ask_a_new_process(code, variables)
    assert int(threads) == (n_cores if own else max(1, n_cores - 1))
    assert set(new) == set(CUDA_SETTINGS)


@pytest.mark.skipif(not blas.preload(), reason="OpenBLAS is not on this machine")
def test_openblas_is_in_the_process():
    assert "libopenblas" in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("first", ["mlx.core", "mlx.nn", "mlx_lm"])
@pytest.mark.skipif(not blas.preload(), reason="OpenBLAS is not on this machine")
def test_mlx_before_mlx_dsa_is_told_in_one_line(first):
    run = subprocess.run(
        [sys.executable, "-c", f"import {first}\nimport mlx_dsa"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr.count("Import mlx_dsa before mlx.core") == 1
    code = "import mlx_dsa, mlx.core, ctypes; ctypes.CDLL('libopenblas.so.0').cblas_sgemm"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    # Who has loaded OpenBLAS before MLX has lost nothing.
    code = f"import ctypes; ctypes.CDLL('libopenblas.so.0', 256); import {first}, mlx_dsa"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    "change",
    [
        None,
        dict(there=True),
        dict(found=False),
        dict(device="gpu"),
        dict(mlx=False),
        dict(platform="darwin"),
    ],
)
def test_only_an_openblas_that_comes_too_late_is_told(monkeypatch, change):
    change = change or {}
    device = SimpleNamespace(type=change.get("device", "cpu"))
    mlx = SimpleNamespace(default_device=lambda: device, DeviceType=SimpleNamespace(cpu="cpu"))
    if change.get("mlx", True):
        monkeypatch.setitem(sys.modules, "mlx.core", mlx)
    else:
        monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(blas, "is_loaded", lambda: change.get("there", False))
    monkeypatch.setattr(blas, "preload", lambda: change.get("found", True))
    monkeypatch.setattr(sys, "platform", change.get("platform", "linux"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        startup.prepare()
    assert [str(w.message) for w in told] == ([] if change else [blas.TOO_LATE])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux loads OpenBLAS")
def test_what_is_loaded_is_known_by_its_name(monkeypatch):
    for name, there in (("libc.so.6", True), ("libnothing.so.0", False)):
        monkeypatch.setattr(blas, "_LIBRARIES", (name,))
        assert blas.is_loaded() == there


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel as pip does, without fetching anything."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_what_is_needed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = ("tiny", "qwen2.5-coder-0.5b", "smollm2-135m")
    for folder in ("configs", *(f"weights/{name}" for name in shipped), "prompts"):
        files = [f for f in (ROOT / folder).rglob("*") if f.is_file()]
        assert files
        for file in files:
            assert f"mlx_dsa/{file.relative_to(ROOT).as_posix()}" in names
    assert not [n for n in names if n.startswith(("tests/", "mlx_dsa/weights/recipe"))]


def test_an_installed_copy_works_from_any_folder(wheel, tmp_path):
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "mlx_dsa", "info"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert str(installed / "mlx_dsa" / "weights" / "tiny") in result.stdout


def test_the_ci_script_runs_lint_and_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "make lint" in text and text.rstrip().endswith("make test")


def test_a_package_without_its_metadata_says_its_version_itself(monkeypatch):
    # As a folder that was copied to a machine: what was measured there must not be lost for it.
    from importlib.metadata import PackageNotFoundError

    from mlx_dsa import machine, versions

    known = machine.versions()

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    found = machine.versions()
    assert found["numpy"] == known["numpy"] and found["mlx-lm"] == known["mlx-lm"]
    assert found.keys() == known.keys() and all(found.values())
