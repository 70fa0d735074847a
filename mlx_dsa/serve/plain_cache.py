"""mlx-lm's own store of states between requests, where no other is given."""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache


class PlainCache(LRUPromptCache):
    """mlx-lm's store, of which something to read is always left."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """Return the caches of the longest known beginning of a prompt, and the rest of it."""
        caches, rest = super().fetch_nearest_cache(model, tokens)
        if rest or caches is None:
            return caches, rest
        if can_trim_prompt_cache(caches) and all(cache.trim(1) == 1 for cache in caches):
            return caches, tokens[-1:]
        return None, tokens

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"):
        """Keep the caches of some tokens."""
        cache_type = cache_type if cache_type in ("system", "user") else "assistant"
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
