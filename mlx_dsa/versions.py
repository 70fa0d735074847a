"""Which version of a package runs here."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version


def package_version(name: str) -> str:
    """Return the version of a package by its name on the index.

    A folder that was copied without its metadata says it itself, or is ``"unknown"``: no
    result of long work may be lost for it.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        module = import_module(name.replace("-", "_"))
        return str(getattr(module, "__version__", "unknown"))
