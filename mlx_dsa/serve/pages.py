"""The page of ``mlx-dsa serve``: its files, and what a browser is told with them."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

_SCRIPT = "text/javascript; charset=utf-8"
_FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "page.js": _SCRIPT,
    "api.js": _SCRIPT,
    "chat.js": _SCRIPT,
    "documents.js": _SCRIPT,
    "kept.js": _SCRIPT,
    "text.js": _SCRIPT,
    "words.js": _SCRIPT,
}

# Nothing from elsewhere, nothing inline, no text turned into markup (trusted types), never in a frame.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version of the package is another page
}


@cache
def _read(name: str) -> bytes:
    return files(__package__).joinpath("page", name).read_bytes()


def static_file(path: str) -> tuple[bytes, str] | None:
    """Find a file of the page.

    Args:
        path (str): Path of a request, ``/`` for the page itself.

    Returns:
        tuple[bytes, str] | None: What it holds and its content type; nothing if it is none of the page's.
    """
    name = "index.html" if path == "/" else path.removeprefix("/")
    if name not in _FILES or not path.startswith("/"):
        return None
    return _read(name), _FILES[name]
