"""How long each stage took, on the page as in the report."""

from accel.evaluation.stage_bars import stage_bars as stages

__all__ = ["stages"]
