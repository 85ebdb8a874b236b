"""mp4 files of recent runs. A baseline that was generated before is found by its run."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accel.runtime.run import Run
from accel.runtime.video import write_mp4

if TYPE_CHECKING:
    from accel.runtime.generate import Video

MAX_VIDEOS = 16  # baselines, and as many accelerated videos


@dataclass(frozen=True)
class CachedVideo:
    """A generated video, its file, and the time of day at which it was measured."""

    video: Video
    path: str
    measured_at: str


class VideoCache:
    """Keeps up to `MAX_VIDEOS` baselines and as many accelerated videos on disk; the oldest are deleted."""

    def __init__(self):
        self._temporary = tempfile.TemporaryDirectory(prefix="accel-")  # deleted with this object
        self.folder = Path(self._temporary.name)
        self._baselines: OrderedDict[str, CachedVideo] = OrderedDict()  # least recently used first
        self._accelerated: deque[Path] = deque()

    def baseline(self, run: Run) -> CachedVideo | None:
        """The baseline of a run if it was generated before; it counts as used now."""
        key = run.model_dump_json()
        if key in self._baselines:
            self._baselines.move_to_end(key)
        return self._baselines.get(key)

    def add_baseline(self, run: Run, video: Video, fps: int) -> CachedVideo:
        """Write a baseline, with its encoding time in `video.seconds`; delete the least recently used one."""
        cached = CachedVideo(video, self._write(run, video, fps), time.strftime("%H:%M:%S"))
        self._baselines[run.model_dump_json()] = cached
        while len(self._baselines) > MAX_VIDEOS:
            Path(self._baselines.popitem(last=False)[1].path).unlink(missing_ok=True)
        return cached

    def add_accelerated(self, run: Run, video: Video, fps: int) -> str:
        """Write an accelerated video, with its encoding time in `video.seconds`; delete the oldest one. Its path."""
        path = self._write(run, video, fps)
        self._accelerated.append(Path(path))
        while len(self._accelerated) > MAX_VIDEOS:
            self._accelerated.popleft().unlink(missing_ok=True)
        return path

    def _write(self, run: Run, video: Video, fps: int) -> str:
        path = self.folder / f"{'-'.join(run.methods) or 'baseline'}-{run.seed}-{uuid.uuid4().hex[:8]}.mp4"
        video.seconds["encode"] = write_mp4(path, video.frames, fps, run.model_dump())
        return str(path)
