"""The addresses of documents."""

from __future__ import annotations

from collections.abc import Callable
from email.parser import BytesParser
from email.policy import HTTP
from functools import partial
from typing import TYPE_CHECKING, Any

from .bodies import parse
from .documents import Documents
from .errors import ApiError, bad
from .messages import check_messages

if TYPE_CHECKING:
    from .handler import Handler
    from .server import Server

_TYPES = ("application/json", "multipart/form-data", "text/plain", "text/markdown", "application/octet-stream")
_UNNAMED = "document"
_MOST_NAME = 200


def add_routes(server: Server, documents: Documents) -> None:
    """Put the addresses of documents into a server.

    Args:
        server (Server): The server.
        documents (Documents): Its documents.
    """

    def put(method: str, path: str, function: Callable[..., None]) -> None:
        server.route(method, path, partial(function, documents))

    put("POST", "/v1/documents", _create)
    put("GET", "/v1/documents", _list)
    put("GET", "/v1/documents/", _get)
    put("POST", "/v1/documents/", _read)
    put("DELETE", "/v1/documents/", _delete)


def _list(documents: Documents, handler: Handler, _rest: str) -> None:
    handler.send_json({"object": "list", "data": documents.listed()})


def _get(documents: Documents, handler: Handler, rest: str) -> None:
    ident, _, what = rest.partition("/")
    if what == "kept":
        handler.send_json(documents.kept(ident))
    elif what:
        raise ApiError(404, "There is nothing at this address.", "not_found")
    else:
        handler.send_json(documents.find(ident).told())


def _delete(documents: Documents, handler: Handler, rest: str) -> None:
    documents.delete(rest)
    handler.send_json({"id": rest, "object": "document.deleted", "deleted": True})


def _read(documents: Documents, handler: Handler, rest: str) -> None:
    ident, _, what = rest.partition("/")
    if what != "read":
        raise ApiError(404, "There is nothing at this address.", "not_found")
    body = handler.read_json()
    answer = body.get("answer")
    if not isinstance(answer, str):
        raise bad("'answer' must be a text.")
    handler.send_json({"read": documents.read(ident, check_messages(body.get("messages")), answer)})


def _create(documents: Documents, handler: Handler, _rest: str) -> None:
    sent = _sent(handler)
    streams = handler.query.get("stream", [""])[-1].lower() in ("1", "true") or "text/event-stream" in (
        handler.headers.get("Accept") or ""
    )

    def tell(*progress: int) -> None:
        if not streams:
            return
        if progress:
            handler.send_event({"object": "document.progress", "tokens": progress[0], "total": progress[1]})
        else:
            handler.begin_events()
            handler.wfile.write(b": waiting\n\n")

    document = documents.create(*sent, tell=tell, has_gone=handler.has_gone)
    if not streams:
        handler.send_json(document)
        return
    handler.send_event(document)
    handler.wfile.write(b"data: [DONE]\n\n")
    handler.end_events()


def _sent(handler: Handler) -> tuple[str, str, str | None]:
    """Return the text that was sent, its name, and a system message if there is one."""
    raw = handler.read_body(_TYPES)
    kind = handler.headers.get_content_type() if handler.headers.get("Content-Type") else "application/json"
    name = handler.query.get("name", [_UNNAMED])[-1]
    system: Any = None
    text: Any
    if kind == "application/json":
        body = parse(raw)
        text, name, system = body.get("text"), body.get("name", name), body.get("system")
        if not isinstance(text, str):
            raise bad("'text' must be the document, a text.")
        if not isinstance(name, str) or not isinstance(system, (str, type(None))):
            raise bad("'name' and 'system' must be texts.")
    elif kind == "multipart/form-data":
        text, name, system = _of_form(handler.headers["Content-Type"], raw, name)
    else:
        text = _decoded(raw)
    return text, " ".join(name.split())[:_MOST_NAME] or _UNNAMED, system


def _of_form(content_type: str, raw: bytes, name: str) -> tuple[str, str, str | None]:
    """Return what a form has: one ``file``, and maybe ``name`` and ``system``."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode("utf-8", "surrogateescape")
    form = BytesParser(policy=HTTP).parsebytes(head + raw)
    if not form.is_multipart():
        raise bad("The form can't be read: its parts are not where its boundary says.")
    found: dict[str, bytes] = {}
    for part in form.iter_parts():
        field = part.get_param("name", header="content-disposition")
        data = part.get_payload(decode=True)
        if not isinstance(field, str) or not isinstance(data, bytes):
            continue
        if field in found:
            raise bad(f"The form has {field!r} twice. Send one file at a time.")
        found[field] = data
        if field == "file":
            name = part.get_filename() or name
    if "file" not in found:
        raise bad("The form must have a 'file', which is the document.")
    texts = {field: _decoded(found[field]) for field in ("file", "name", "system") if field in found}
    return texts["file"], texts.get("name", name), texts.get("system")


def _decoded(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad(f"The document is not UTF-8 text (byte {error.start:,} is not). Convert it first.") from None
    if "\0" in text:
        raise bad("The document is no text: it holds zero bytes.")
    return text
