"""What a pair shows, in one sentence, on the page as in the report."""

from accel.evaluation.verdict import verdict

__all__ = ["verdict"]
