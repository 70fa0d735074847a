"""A server for many long conversations at once: mlx-lm's own, with sparse caches and bounds."""

from .options import ServeOptions
from .server import Server

__all__ = ["ServeOptions", "Server"]
