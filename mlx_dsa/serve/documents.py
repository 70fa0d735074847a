"""Documents that are read once and asked often."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..maker import maker_of
from ..saved import load_cache, pack_saved, write_saved
from ..texts import is_broken
from .answer import listen
from .bodies import plain_arguments
from .copies import copies_of
from .document import Document, DocumentPrompts
from .errors import ApiError, Gone, bad, overloaded
from .generation import Generation
from .looks import Looks, kept_tokens
from .segments import Prompt
from .snapshot import Snapshot
from .snapshots import Snapshots
from .store import KIND, name_of, packed, saved_in, unpacked
from .ticket import Request

_MOST_READ = 50
# Tokens of an answer that are looked at, of a conversation before it, and those read at once.
_MOST_ANSWER, _MOST_ASKED, _PIECE = 512, 8192, 256


class Documents:
    """Read documents, keep them, and make the prompts that ask them.

    All methods may be called by any thread; what needs the model is done by the thread that runs it.

    Args:
        generation (Generation): That thread.
        snapshots (Snapshots): What it has for a prompt cache.
        folder (Path, optional): Where documents outlive the server, and those that are out of
          memory are. Default: ``None``.
        max_bytes (int, optional): Bytes that the caches of all documents may have; beyond it new ones are
          refused. Default: ``None``.
        memory_bytes (int, optional): Bytes of them in memory, where there is a folder; beyond it
          those least recently asked are left on disk. Default: ``None``.
        think (bool, optional): As :class:`ChatTemplate` takes it. Default: ``None``.
    """

    def __init__(
        self,
        generation: Generation,
        snapshots: Snapshots,
        *,
        folder: Path | None = None,
        max_bytes: int | None = None,
        memory_bytes: int | None = None,
        think: bool | None = None,
    ):
        provider: Any = generation.model_provider
        self._generation, self._snapshots = generation, snapshots
        self._patch, self._model = provider.patch, provider.model
        config = provider.config
        self.prompts = DocumentPrompts(provider.tokenizer, generation.tokenizing, config, think)
        self._folder = folder if self._patch is not None else None
        self._max_bytes, self._memory_bytes = max_bytes, memory_bytes
        self._maker: Mapping[str, Any] = {}
        self._numbers = itertools.count(1)
        self._there: dict[str, Document] = {}
        self._by_number: dict[int, Document] = {}
        self._being_read: set[str] = set()
        self._changed = threading.Condition()
        snapshots.bring = self._bring

    def attach(self):
        """Find the documents that are there from before; called once.

        Raises:
            ValueError: If the folder can't be used.
        """
        self._generation.call(self._attach)

    def _attach(self):
        if self._patch is None:
            return
        self._maker = self._snapshots.maker or maker_of(self._patch)
        if self._folder is None:
            return
        for path, metadata in saved_in(self._folder, self._patch, self._maker, "document"):
            with suppress(KeyError, ValueError, TypeError):
                about = json.loads(metadata["about"])
                tokens = unpacked(metadata["read"]).tolist()
                self._add(Document(number=-next(self._numbers), tokens=tokens, path=path, **about))

    def _add(self, document: Document):
        with self._changed:
            self._there[document.id] = self._by_number[document.number] = document
            self._snapshots.name(document.number, document.id)

    # Reading.

    def create(
        self,
        text: str,
        name: str,
        system: str | None = None,
        tell: Callable[..., None] = lambda *progress: None,
        has_gone: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Read a document, unless it is there.

        Args:
            text (str): The document.
            name (str): What it is called.
            system (str, optional): A system message before it. Default: ``None``.
            tell (callable): Takes tokens read and to read, or nothing while it waits.
              Default: nothing.
            has_gone (callable): Whether the client has gone. Default: never.

        Returns:
            dict: The document, as clients are told.

        Raises:
            ApiError: If it can't be read, or there is no room.
            Gone: If the client has gone: nothing is kept.
        """
        if any(map(is_broken, (text, name, system or ""))):
            raise bad("'text', 'name' and 'system' must be text.")
        if not text.strip():
            raise bad("The document is empty.")
        with self._generation.working():
            return self._create(text, name, system or "", tell, has_gone)

    def _create(self, text: str, name: str, system: str, tell: Any, has_gone: Any) -> dict[str, Any]:
        settings = repr(self._patch.config) if self._patch is not None else ""
        known = name_of(self._maker, settings, str(self.prompts.think), system, text.strip())
        ident = f"doc-{known}"
        with self._changed:
            while ident in self._being_read:
                self._changed.wait(0.2)
                if has_gone():
                    raise Gone
            if ident in self._there:
                return self._there[ident].told()
            self._being_read.add(ident)
        try:
            return self._read(ident, text, name, system, tell, has_gone).told()
        finally:
            with self._changed:
                self._being_read.discard(ident)
                self._changed.notify_all()

    def _read(self, ident: str, text: str, name: str, system: str, tell: Any, has_gone: Any) -> Document:
        tokens, begins = self.prompts.read(text, system)
        self._check_room(self._estimate(len(tokens)))
        generation, number = self._generation, -next(self._numbers)
        # One token more, so that there is an answer, of which nothing is wanted.
        prompt = [*tokens, tokens[-1]]
        generation.call(partial(self._snapshots.begin_document, prompt, len(tokens), number))
        caches = None
        try:
            request = Request("text", "", [], None, None, tokens=prompt)
            request.segments, request.segment_types = [tokens, tokens[-1:]], ["document", "prompt"]
            ticket = generation.submit(request, plain_arguments(1))
            try:
                for _ in listen(ticket, partial(generation.next_said, ticket), has_gone, tell):
                    pass
            finally:
                generation.done(ticket)
        finally:
            caches = generation.call(partial(self._snapshots.end_document, number))
        if caches is None:
            raise ApiError(500, "The document could not be kept. Send it again.")
        nbytes = sum(cache.nbytes for cache in caches)
        self._check_room(nbytes)
        entries = max((cache.size() for cache in caches), default=0)
        document = Document(ident, number, name, system, tokens, begins, entries, nbytes, int(time.time()))
        if self._folder is not None:
            self._save(document, caches, self._folder)
        generation.call(partial(self._begin, document, caches))
        return document

    def _begin(self, document: Document, caches: list[Any]):
        # Between two steps: whoever finds it can ask or delete it.
        self._pin(document, caches)
        self._add(document)

    def _estimate(self, n_tokens: int) -> int:
        provider: Any = self._generation.model_provider
        evicts = provider.config is not None and provider.config.cache == "budget"
        return provider.token_bytes * (min(n_tokens, provider.config.top_k) if evicts else n_tokens)

    def _check_room(self, wanted: int):
        held = sum(document.nbytes for document in self._all())
        if self._max_bytes is not None and held + wanted > self._max_bytes:
            raise overloaded("There is no room for another document. Delete one, and send this again.", 60)

    def _save(self, document: Document, caches: list[Any], folder: Path):
        about = {**vars(document)}
        for key in ("number", "tokens", "path"):
            about.pop(key)
        read = packed(np.array(document.tokens, np.int32))
        metadata = {KIND: "document", "about": json.dumps(about), "read": read}
        path = folder / f"{document.id}.safetensors"

        def pack():
            arrays, header = pack_saved(copies_of(caches), self._patch, metadata, self._maker)
            arrays = {key: mx.contiguous(array) for key, array in arrays.items()}
            mx.eval(arrays)
            return arrays, header

        try:
            # The disk makes nobody wait but who sent the document.
            write_saved(path, *self._generation.call(pack))
        except ValueError as error:
            raise ApiError(503, str(error).removeprefix("[save_cache] "), headers={"Retry-After": "60"}) from None
        document.path = path

    # In memory.

    def _pin(self, document: Document, caches: list[Any]):
        snapshots = self._snapshots
        snapshots.pin(document.number, document.tokens, caches)
        if self._memory_bytes is not None:
            self.free(sum(p.nbytes for p, _ in self._inside()) - self._memory_bytes, document.number)

    def _inside(self) -> list[tuple[Snapshot, Document]]:
        """Return the documents in memory that are on disk, too, the one first that was asked least recently."""
        pinned = [(self._snapshots.pinned(d.number), d) for d in self._all() if d.path is not None]
        return sorted(((p, d) for p, d in pinned if p is not None), key=lambda item: item[0].used)

    def free(self, n_bytes: int, but: int):
        """Leave documents but one, by its number, on disk until some bytes are free; in the model's thread."""
        for pinned, document in self._inside():
            if n_bytes <= 0:
                break
            if document.number != but:
                self._snapshots.unpin(document.number)
                n_bytes -= pinned.nbytes

    def _bring(self, number: int):
        """Have a document in memory, in the model's thread."""
        document = self._by_number.get(number)
        if document is None:
            raise ApiError(404, "The document has been deleted.", "document_not_found")
        if self._snapshots.pinned(number) is not None:
            return
        assert document.path is not None and self._patch is not None  # or it would be in memory
        try:
            caches = load_cache(document.path, self._patch, self._maker).caches
        except ValueError:
            self._drop(document)
            raise ApiError(404, "The document's file is gone or damaged. Send the document again.") from None
        self._pin(document, caches)

    def _drop(self, document: Document):
        with self._changed:
            self._there.pop(document.id, None)
            self._by_number.pop(document.number, None)
        self._snapshots.unpin(document.number, forget=True)

    # What clients ask.

    def _all(self) -> list[Document]:
        with self._changed:
            return list(self._there.values())

    def find(self, ident: str) -> Document:
        """Return a document; raise an ``ApiError`` (404) where there is none."""
        with self._changed:
            document = self._there.get(ident)
        if document is None:
            shown = ident if len(ident) <= 60 else f"{ident[:60]}..."
            raise ApiError(404, f"There is no document {shown!r}.", "document_not_found")
        return document

    def listed(self) -> list[dict[str, Any]]:
        """Return all documents, the oldest first."""
        return [d.told() for d in sorted(self._all(), key=lambda d: (d.created, -d.number))]

    def delete(self, ident: str):
        """Delete a document, its file, and all conversations about it."""
        document = self.find(ident)
        if document.path is not None:
            with suppress(OSError):
                document.path.unlink(missing_ok=True)
        self._generation.call(partial(self._drop, document))

    def tokenize(
        self,
        ident: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Make the prompt of a chat about a document: see :meth:`DocumentPrompts.ask`."""
        return self.prompts.ask(self.find(ident), messages, tools, options)

    def kept(self, ident: str) -> dict[str, Any]:
        """Return a document's text by tokens, and which of them each layer has kept."""
        document = self.find(ident)
        n = len(document.tokens)
        layers, kept = self._generation.call(lambda: kept_tokens(self._model, self._caches(document), n))
        return {"pieces": self.prompts.pieces(document), "layers": layers, "kept": kept}

    def _caches(self, document: Document) -> list[Any]:
        self._bring(document.number)
        pinned = self._snapshots.pinned(document.number)
        assert pinned is not None
        return pinned.caches

    def read(self, ident: str, messages: Sequence[Mapping[str, Any]], answer: str) -> list[list[Any]]:
        """Find which tokens of a document an answer pays most attention to.

        Args:
            ident (str): The document's id.
            messages (sequence): The chat before the answer.
            answer (str): The answer, of which the first 512 tokens count.

        Returns:
            list: Pairs of a token's place and its share of the attention, the largest first.
        """
        document = self.find(ident)
        prompt = self.prompts.ask(document, messages)[0][len(document.tokens) :]
        said = self.prompts.encode(answer)[:_MOST_ANSWER]
        if not said:
            raise bad("'answer' is empty.")
        if len(prompt) > _MOST_ASKED:
            raise bad(f"The messages have {len(prompt):,} tokens but {_MOST_ASKED:,} is the most here.")
        call = self._generation.call
        looks = call(lambda: Looks(self._model, copies_of(self._caches(document)), len(document.tokens)))
        # A token is chosen by what the one before it has read. Between pieces others go on.
        for tokens, looking in ((prompt[:-1], False), ([prompt[-1], *said[:-1]], True)):
            for at in range(0, len(tokens), _PIECE):
                call(partial(looks.read, tokens[at : at + _PIECE], looking))
        shares = call(looks.shares)
        # The very first tokens are paid attention by everything.
        shares[: max(document.begins, self._patch.config.n_sink if self._patch is not None else 0)] = 0
        best = np.argsort(-shares, kind="stable")[:_MOST_READ]
        return [[int(i), round(float(shares[i]), 6)] for i in best if shares[i] > 0]
