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
MAX_BYTES = 2**29  # of frames: five videos of 81 frames of 480x832


@dataclass(frozen=True)
class Reference:
    """A generated video with what was measured on it, and when that was (UTC)."""

    video: Video
    measured_at: str


class ReferenceCache:
    """The last references by their run, up to both limits but at least one; the least recently used one goes first.

    Thread-safe.
    """

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
        reference = Reference(video, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
        with self._lock:
            self._references[run.model_dump_json()] = reference
            while len(self._references) > 1 and self._is_full():
                self._references.popitem(last=False)
        return reference

    def _is_full(self) -> bool:
        size = sum(reference.video.frames.nbytes for reference in self._references.values())
        return len(self._references) > MAX_REFERENCES or size > MAX_BYTES
