"""What a model is: which layers have attention, what the others keep, and its head."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..positions import max_positions
from .layer import Layer, Rope


class Family:
    """Models of mlx-lm that are built alike; one file a family, and a row in the registry.

    Attributes:
        model_types (tuple of str): ``model_type`` of their configs.
        layer_type (type): Of their attention layers.
        is_scaled (bool): Whether mlx-lm builds them with the RoPE scaling of their config.
    """

    model_types: tuple[str, ...] = ()
    layer_type: type[Layer] = Layer
    is_scaled = True

    def text_model(self, model: nn.Module) -> nn.Module:
        """Return the part that reads and writes tokens."""
        return model

    def args(self, model: nn.Module) -> Any:
        """Return the model's args, where its sizes stand."""
        return self.text_model(model).args

    def decoder(self, model: nn.Module) -> nn.Module:
        """Return the part that makes hidden states of tokens."""
        return self.text_model(model).model

    def rope(self, args: Any) -> Rope:
        """Return the rotary positions of its attention."""
        scaling = args.rope_scaling if self.is_scaled else None
        return Rope(args.rope_theta, scaling, args.max_position_embeddings or 0)

    def max_positions(self, model: nn.Module) -> int | None:
        """Return the tokens that a model can tell the places of; ``None`` for no limit."""
        return max_positions(self.args(model), self.is_scaled)

    def refusal(self, model: nn.Module) -> str | None:
        """Return why sparse attention can't be right for a model of this family."""
        return None

    def layers(self, model: nn.Module) -> dict[int, Layer]:
        """Return the attention layers by their number; other layers are left out."""
        rope = self.rope(self.args(model))
        return {i: self.layer_type(i, block, rope) for i, block in enumerate(model.layers) if "self_attn" in block}

    def make_caches(self, model: nn.Module) -> list[Any]:
        """Make the caches that mlx-lm makes for the model, one a layer."""
        own = getattr(type(model), "make_cache", None)
        return own(model) if own else [KVCache() for _ in model.layers]

    def embed(self, model: nn.Module, ids: mx.array) -> mx.array:
        """Return the hidden states before the first layer ``[B, L, dim]``."""
        return self.decoder(model).embed_tokens(ids)

    def hidden(self, model: nn.Module, ids: mx.array, caches: list[Any] | None) -> mx.array:
        """Return the last hidden states of tokens ``[B, L, dim]``, normalised."""
        return self.decoder(model)(ids, cache=caches)

    def logits(self, model: nn.Module, hidden: mx.array) -> mx.array:
        """Return the logits of hidden states ``[B, L, V]``."""
        if self.args(model).tie_word_embeddings:
            return self.decoder(model).embed_tokens.as_linear(hidden)
        return self.text_model(model).lm_head(hidden)
