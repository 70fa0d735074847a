"""What other packages bring: modules whose import registers it."""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import entry_points


@functools.cache
def load_plugins(what: str) -> None:
    """Import the modules that installed packages name, once; one that fails is warned of.

    Args:
        what (str): What they register, such as ``"rules"``: the entry points are
          ``mlx_dsa.rules`` then.
    """
    for plugin in entry_points(group=f"mlx_dsa.{what}"):
        try:
            plugin.load()
        except Exception as error:  # of a package that is not ours
            warnings.warn(
                f"mlx-dsa: the {what} of {plugin.value} can't be loaded: {error}. Mend or remove the "
                f"package that names them.",
                stacklevel=2,
            )
