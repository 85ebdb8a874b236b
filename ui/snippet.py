"""The accelerated run of a pair as Python code that a reader can take home."""

from accel.runtime.repeat import python_code as snippet

__all__ = ["snippet"]
