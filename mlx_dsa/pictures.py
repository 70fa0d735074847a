"""Figures of matplotlib as PNG files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import replacing


def check_pictures():
    """Refuse to begin what ends in a picture where none can be drawn.

    Raises:
        ValueError: If matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("[plot] drawing needs matplotlib: pip install matplotlib.") from None


def save_picture(draw: Callable[[Any], Any], path: str | os.PathLike, font_size: int = 9):
    """Draw a figure and save it as a PNG.

    Args:
        draw (callable): Takes ``matplotlib.pyplot`` and returns the figure.
        path (str or PathLike): Where to; the folder is made.
        font_size (int): In points. Default: ``9``.

    Raises:
        ValueError: If matplotlib is missing.
    """
    check_pictures()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"font.size": font_size, "axes.spines.top": False, "axes.spines.right": False}
    path = Path(path)
    with plt.rc_context(style):
        figure = draw(plt)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            figure.savefig(part, dpi=150, bbox_inches="tight", format="png")
        plt.close(figure)
