"""What a calibration measures in each layer, and what it concludes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import mlx.core as mx

from ..families import Layer
from ..train.teacher import LayerView
from .config import CalibrateConfig

Found = dict[str, mx.array]


class Finder:
    """Measure layers on sequences; conclude from the sums over all of them.

    Args:
        config (CalibrateConfig): The calibration.

    Attributes:
        kind (str): The rule of selecting that reads the result.
    """

    kind: ClassVar[str]

    def __init__(self, config: CalibrateConfig):
        self.config = config

    @property
    def shortest(self) -> int:
        """What a sequence's tokens must exceed to show anything."""
        return 1

    def measure(self, layer: Layer, view: LayerView) -> Found:
        """Return what one sequence shows of a layer: arrays that are added up.

        Args:
            layer (Layer): The layer.
            view (LayerView): What it works on, of one sequence.
        """
        raise NotImplementedError

    def conclude(self, sums: Mapping[int, Found]) -> tuple[dict[int, Found], list[str]]:
        """Return what is written of each layer, and what to tell of it.

        Args:
            sums (Mapping): Layer number to the sums of what was measured.
        """
        raise NotImplementedError
