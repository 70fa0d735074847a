"""What decides the keys and values that a patched model makes of a text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .fingerprint import fingerprint
from .patch import SparsePatch


def maker_of(patch: SparsePatch) -> dict[str, Any]:
    """Return what decides the keys and values that a patched model makes of a text.

    Args:
        patch (SparsePatch): Of the model.

    Returns:
        dict: As JSON gives it back: fingerprints of ``"model"`` and ``"indexer"``, and
        ``"settings"`` that tell models apart by name.
    """
    modules = patch.dense_modules()
    indexers = {
        f"{i}.{name}": module
        for i, layer in patch.layers.items()
        for name, module in (layer.indexer.named_modules() if layer.indexer else ())
    }
    dtype = next(iter(patch.layers.values())).layer.dtype
    quantized = next((m for m in modules.values() if hasattr(m, "bits")), None)
    made_by = {
        "model": fingerprint(modules)._asdict(),
        "indexer": fingerprint(indexers)._asdict(),
        # What is likely to differ where a form does, to name it.
        "settings": {
            **dataclasses.asdict(modules[""].args),
            "dtype": str(dtype).removeprefix("mlx.core."),
            "bits of a weight": quantized and quantized.bits,
        },
    }
    return json.loads(json.dumps(made_by, default=str))


def check_maker(path: Path, stored: Mapping[str, Any], mine: Mapping[str, Any]):
    """Refuse a file that was made with something else.

    Args:
        path (Path): The file, for the message.
        stored, mine (Mapping): From :func:`maker_of`, in the file and here.

    Raises:
        ValueError: If the model or the indexers differ.
    """
    for of in ("model", "indexer"):
        if stored[of]["form"] != mine[of]["form"]:
            raise ValueError(
                f"[load_cache] {path} was made with {_difference(of, stored, mine)}. Load "
                f"what it was made with, or make the cache again."
            )
        if stored[of]["weights"] != mine[of]["weights"]:
            raise ValueError(
                f"[load_cache] {path} was made with other {of} weights. Load those, or make the cache again."
            )


def _difference(of: str, stored: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    then, now = stored["settings"], mine["settings"]
    for name in then | now if of == "model" else ():
        if then.get(name) != now.get(name):
            return f"{name} = {then.get(name)} but the model has {now.get(name)}"
    return f"another form of {of}"
