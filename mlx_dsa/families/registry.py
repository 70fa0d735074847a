"""Which family a model is of; the one place that refuses."""

from __future__ import annotations

import mlx.nn as nn

from ..positions import max_positions
from .family import Family
from .llama import Llama
from .qwen2 import Qwen2
from .qwen3 import Qwen3
from .qwen3_5 import Qwen35
from .qwen3_moe import Qwen3Moe
from .qwen3_next import Qwen3Next

FAMILIES: tuple[Family, ...] = (
    Qwen3(),
    Qwen3Moe(),
    Qwen2(),
    Llama(),
    Qwen3Next(),
    Qwen35(),
)

_WINDOWS = "some of its layers attend to a sliding window"
_SINKS = "its attention has sinks as parameters"
_SHARED = "some of its layers share keys and values"
_REASONS = {
    **dict.fromkeys(("gemma3", "gemma3_text", "cohere2", "olmo3"), _WINDOWS),
    **dict.fromkeys(("exaone4", "exaone_moe", "ministral3", "step3p5", "afmoe"), _WINDOWS),
    **dict.fromkeys(("gpt_oss", "mimo_v2_flash", "deepseek_v41"), _SINKS),
    **dict.fromkeys(("gemma3n", "gemma4", "gemma4_text", "afm7"), _SHARED),
}


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    Args:
        model (nn.Module): From mlx-lm, patched or not.

    Raises:
        ValueError: If sparse attention does not know such models, or can't be right
          for them.
    """
    kind, found = _kind(model), _find(model)
    reason = _REASONS.get(kind) if found is None else found.refusal(model)
    if reason is not None:
        raise ValueError(f"[family_of] a {kind!r} model can't have sparse attention: {reason}. Run it dense.")
    if found is None:
        raise ValueError(
            f"[family_of] 'model' must be of type {', '.join(model_types())} but got {kind!r}. Run it dense."
        )
    return found


def positions_of(model: nn.Module) -> int | None:
    """Return the tokens that a model can tell the places of, of a known family or not.

    Args:
        model (nn.Module): From mlx-lm, patched or not.

    Returns:
        int, optional: ``None`` for no limit.
    """
    found = _find(model)
    return max_positions(model.args) if found is None else found.max_positions(model)


def _kind(model: nn.Module) -> str:
    return getattr(model, "model_type", type(model).__name__)


def _find(model: nn.Module) -> Family | None:
    return next((f for f in FAMILIES if _kind(model) in f.model_types), None)


def model_types() -> list[str]:
    """Return the ``model_type`` of every model that sparse attention knows."""
    return [kind for family in FAMILIES for kind in family.model_types]
