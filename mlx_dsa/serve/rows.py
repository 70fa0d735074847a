"""The rows of a batch: mlx-lm's BatchGenerator, or one row at a time where caches can't be merged."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..cache import RowsCache
from .copies import copies_of
from .errors import overloaded
from .row import Row, cut_segments
from .sampling import processors_of, sampler_of, try_out
from .ticket import Ticket

if TYPE_CHECKING:
    from .generation import Generation

log = logging.getLogger("mlx_dsa.serve")
_PUBLISH_SECONDS = 0.2


class Rows:
    """What is answered now. Only the generation thread has it.

    Args:
        owner (Generation): Whose thread this is.
    """

    def __init__(self, owner: Generation):
        self._owner = owner
        self._provider = owner.provider
        self._stream = mx.default_stream(mx.default_device())
        self._rows: dict[int, Row] = {}
        self._alone: Iterator[None] | None = None
        self._batch: BatchGenerator | None = None
        self._special: list[int] | None = None
        self._gauges: dict[str, float] = {}
        self._gauged_at = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def has_room(self, ticket: Ticket) -> bool:
        """Return whether a request can begin now.

        Args:
            ticket (Ticket): The next one.
        """
        if not self._rows:
            return True
        options = self._owner.options
        if not self._provider.is_batchable or len(self._rows) >= options.decode_concurrency:
            return False
        if sum(row.is_reading for row in self._rows.values()) >= options.prompt_concurrency:
            return False
        return self._fits(ticket)

    def _fits(self, ticket: Ticket) -> bool:
        limit = self._owner.options.memory_limit
        if limit is None:
            return True
        # What those that are being answered may still take is spoken for.
        held = sum(cache.nbytes for cache in self._caches())
        promised = max(0, sum(self._estimate(row.ticket) for row in self._rows.values()) - held)
        wanted = self._estimate(ticket) + promised
        if mx.get_active_memory() + wanted <= limit:
            return True
        store, documents = self._owner.prompt_cache, self._owner.documents
        store.trim_to(n_bytes=max(0, store.nbytes - (mx.get_active_memory() + wanted - limit)))
        if documents is not None:
            documents.free(mx.get_active_memory() + wanted - limit, ticket.prompt[0])
        mx.clear_cache()
        return mx.get_active_memory() + wanted <= limit

    def _estimate(self, ticket: Ticket) -> int:
        """Return the bytes that a request may take at most, but for what a step needs."""
        n = len(ticket.prompt) + ticket.args.max_tokens
        config = self._provider.config
        if config is not None and config.cache == "budget":
            n = min(n, len(ticket.prompt) + config.top_k)
            if config.prefill == "stream":
                n = min(n, config.top_k + 2 * config.stream_chunk)
        return n * self._provider.token_bytes

    def add(self, ticket: Ticket) -> None:
        """Begin a request.

        Args:
            ticket (Ticket): One for which there is room.

        Raises:
            Exception: If it can't begin; no other row is touched.
        """
        if not self._fits(ticket):
            self._owner.metrics.count("requests_refused")
            raise overloaded("There is not enough memory for this request now. Ask again later.", 5)
        provider, owner = self._provider, self._owner
        if self._special is None:
            tokenizer = provider.tokenizer
            self._special = [*tokenizer.encode("\n", add_special_tokens=False), *tokenizer.eos_token_ids]
        sampler = sampler_of(ticket.args, self._special)
        processors = processors_of(ticket.args)
        if processors or ticket.args.sampling.temperature > 0:
            try_out(sampler_of(ticket.args, self._special), processors, ticket.prompt, provider.vocab_size)
        caches, rest = owner.prompt_cache.fetch_nearest_cache(provider.model_key, ticket.prompt)
        n_cached = len(ticket.prompt) - len(rest)
        row = Row(ticket, provider.tokenizer, owner.metrics, n_cached, provider.token_bytes)
        if provider.is_batchable:
            self._insert(row, caches, sampler, processors)
        else:
            self._rows[-1] = row
            self._alone = self._answer_alone(row, caches, sampler, processors)
        ticket.put(row.context)

    def _insert(self, row: Row, caches: Any, sampler: Any, processors: Any) -> None:
        ticket, options = row.ticket, self._owner.options
        if self._batch is None:
            self._batch = BatchGenerator(
                self._provider.model,
                completion_batch_size=options.decode_concurrency,
                prefill_batch_size=options.prompt_concurrency,
                prefill_step_size=options.prompt_chunk,
                stream=self._stream,
            )
        (uid,) = self._batch.insert_segments(
            segments=[cut_segments(ticket, row.n_cached)],
            max_tokens=[ticket.args.max_tokens],
            caches=[caches],
            all_tokens=[ticket.prompt[: row.n_cached]],
            samplers=[sampler],
            logits_processors=[processors],
            stop_sequences=[ticket.stop_sequences],
        )
        self._rows[uid] = row

    def step(self) -> None:
        """Take each row a step further."""
        if self._alone is not None:
            try:
                next(self._alone)
            except StopIteration:
                self._forget(-1)
            return
        assert self._batch is not None
        read, written = self._batch.next()
        for response in read:
            self._rows[response.uid].read(*response.progress)
        self._keep_ends(read)
        for response in written:
            self._write(response)

    def _keep_ends(self, read: list[Any]) -> None:
        """Keep the state at the end of each part of a prompt but the last."""
        assert self._batch is not None
        ends = [r.uid for r in read if r.end_of_segment and not r.end_of_prompt and self._rows[r.uid].types]
        if not ends:
            return
        for uid, (caches, tokens) in self._batch.extract_cache(ends).items():
            self._keep(tokens[:], caches, self._rows[uid].types.pop(0))

    def _write(self, response: Any) -> None:
        assert self._batch is not None
        row = self._rows[response.uid]
        finish = row.write(response.token, response.logprobs, response.finish_reason)
        if finish is None:
            return
        caches, tokens = response.prompt_cache, response.all_tokens
        if response.finish_reason is None:  # a stop text, of which mlx-lm's batch knows nothing
            removed = self._batch.remove([response.uid], return_prompt_caches=True)
            caches, tokens = removed[response.uid]
        row.end(caches, len(tokens))
        self._forget(response.uid)
        self._keep(tokens[:], caches, "assistant")

    def _keep(self, tokens: list[int], caches: list[Any], kind: str) -> None:
        key = self._provider.model_key
        try:
            self._owner.prompt_cache.insert_cache(key, tokens, caches, cache_type=kind)
        # What is not kept is read again: no reason to end an answer.
        except Exception as error:
            log.warning("A state was not kept: %s: %s", type(error).__name__, error)

    def _answer_alone(self, row: Row, caches: Any, sampler: Any, processors: Any) -> Iterator[None]:
        """Answer one request, a step at each call: for caches that are no rows of a batch."""
        model, ticket = self._provider.model, row.ticket
        caches = make_prompt_cache(model) if caches is None else caches
        *parts, last = cut_segments(ticket, row.n_cached)
        if len(last) > 1:  # as mlx-lm's batches do: the last token is read by itself
            parts, last = [*parts, last[:-1]], last[-1:]
        n_read, total = 0, len(ticket.prompt) - row.n_cached
        for part in parts:
            for begin in range(0, len(part), self._owner.options.prompt_chunk):
                chunk = part[begin : begin + self._owner.options.prompt_chunk]
                self._read(chunk, caches)
                n_read += len(chunk)
                row.read(n_read, total)
                yield
            if row.types:
                self._keep_copy(ticket.prompt[: row.n_cached + n_read], caches, row.types.pop(0))
        tokens = ticket.prompt[:]
        matcher = ticket.stop_sequences.matcher()
        steps = generate_step(
            mx.array(last),
            model,
            self._stream,
            max_tokens=ticket.args.max_tokens,
            sampler=sampler,
            logits_processors=processors,
            prompt_cache=caches,
        )
        row.read(total, total)
        for n, (token, logprobs) in enumerate(steps, 1):
            tokens.append(int(token))
            finish = "length" if n >= ticket.args.max_tokens else None
            finish = "stop" if matcher.advance(int(token)) else finish
            finish = row.write(int(token), logprobs, finish)
            if finish is not None:
                mx.eval([cache.state for cache in caches])
                row.end(caches, len(tokens))
                self._keep(tokens, caches, "assistant")
                return
            yield

    def _read(self, tokens: list[int], caches: list[Any]) -> None:
        with mx.stream(self._stream):
            self._provider.model(mx.array([tokens]), cache=caches)
            # Also tells sparse caches that a call of one token was of a prompt.
            mx.eval([cache.state for cache in caches])
        mx.clear_cache()

    def _keep_copy(self, tokens: list[int], caches: list[Any], kind: str) -> None:
        try:
            copied = copies_of(caches)
        except ValueError as error:  # of two tiers with a file: its entries are one conversation's
            log.warning("A state was not kept: %s", error)
            return
        self._keep(tokens, copied, kind)

    def drop_cancelled(self) -> None:
        """Free the rows whose clients have gone."""
        gone = [uid for uid, row in self._rows.items() if row.is_cancelled]
        if not gone:
            return
        if self._batch is not None:
            self._batch.remove([uid for uid in gone if uid >= 0])
        for uid in gone:
            self._forget(uid)
        self._owner.metrics.count("requests_cancelled", len(gone))

    def _forget(self, uid: int) -> None:
        self._rows.pop(uid, None)
        if uid == -1:
            self._alone = None

    def fail(self, error: Exception) -> None:
        """Answer all rows with an error, and begin anew.

        Args:
            error (Exception): What their clients are told.
        """
        for row in self._rows.values():
            row.ticket.put(error)
        self._rows.clear()
        self.close()
        mx.clear_cache()

    def close(self) -> None:
        """Let the batch go."""
        self._alone = None
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def gauges(self) -> dict[str, float]:
        """Return what the rows hold, counted a few times a second."""
        reading = sum(row.is_reading for row in self._rows.values())
        now = time.monotonic()
        if now - self._gauged_at > _PUBLISH_SECONDS or not self._rows:
            self._gauged_at = now
            caches = self._caches()
            self._gauges = {
                "kv_bytes": sum(cache.nbytes for cache in caches),
                "entries_kept": sum(_entries(cache) for cache in caches),
            }
        return {**self._gauges, "rows_reading": reading, "rows_decoding": len(self._rows) - reading}

    def _caches(self) -> list[Any]:
        batch = self._batch
        if batch is None:
            return []
        return [*batch._prompt_batch.prompt_cache, *batch._generation_batch.prompt_cache]


def _entries(cache: Any) -> int:
    """Return the entries of a batch's cache over all rows, as far as it says."""
    if isinstance(cache, RowsCache):
        return sum(row.size() for row in cache.rows)
    try:
        rows = cache.offset.shape[0] if hasattr(cache.offset, "shape") else 1
        return int(cache.size() or getattr(cache, "_idx", 0)) * rows
    except (AttributeError, TypeError, IndexError):
        return 0
