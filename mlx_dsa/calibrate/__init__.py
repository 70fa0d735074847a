"""Find offline, on text, what rules of selecting read of a model's heads."""

from .run import CALIBRATIONS, CalibrateConfig, CalibrateProgress, CalibrateResult, calibrate

__all__ = ["CALIBRATIONS", "CalibrateConfig", "CalibrateProgress", "CalibrateResult", "calibrate"]
