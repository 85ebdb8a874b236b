"""Reference videos that were generated before, with what was measured then."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.runtime.run import Run

if TYPE_CHECKING:
    from accel.runtime.generate import Video

MAX_REFERENCES = 16


@dataclass(frozen=True)
class Reference:
    """A generated video with what was measured on it, and the time of day at which that was."""

    video: Video
    measured_at: str


class ReferenceCache:
    """The last `MAX_REFERENCES` references by their run; the least recently used one goes first. Thread-safe."""

    def __init__(self):
        self._references: OrderedDict[str, Reference] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, run: Run) -> Reference | None:
        """The reference of a run if it is kept; it counts as used now."""
        key = run.model_dump_json()
        with self._lock:
            if key in self._references:
                self._references.move_to_end(key)
            return self._references.get(key)

    def add(self, run: Run, video: Video) -> Reference:
        """Keep a video as the reference of its run."""
        reference = Reference(video, time.strftime("%H:%M:%S"))
        with self._lock:
            self._references[run.model_dump_json()] = reference
            while len(self._references) > MAX_REFERENCES:
                self._references.popitem(last=False)
        return reference
