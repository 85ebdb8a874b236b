"""The one folder for everything that the page writes, and what happens to it at the start and at the end.

    DATA/                    kept if it was asked for; else a temporary folder, removed at the end
    DATA/runs, page.sqlite   the store
    DATA/scratch-*/          temporary files of one process, Gradio's too; removed at its end

A process holds a lock in its folders, so that the next one can tell what a crash has left behind.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO

from accel.errors import AccelError, explain_os_error

TEMPORARY, SCRATCH, LOCK = "accel-page-", "scratch-", "in-use-by-page"
YOUNG_SECONDS = 60  # a folder without a lock may belong to a process that is just starting


class DataFolder:
    """DATA and this process's scratch folder, which all temporary files of the process and of Gradio go to."""

    def __init__(self, wanted: Path | None = None):
        """Open or create `wanted`, or a temporary folder; remove what crashed processes have left in it or beside it.

        Raises AccelError if the folder cannot be used.
        """
        self._before = tempfile.tempdir, os.environ.get("GRADIO_TEMP_DIR")
        self._locks: list[IO] = []
        try:
            if wanted is not None:
                wanted.mkdir(parents=True, exist_ok=True)
            self.temporary = wanted is None
            self.path = self._claim(Path(tempfile.gettempdir()), TEMPORARY) if wanted is None else wanted.resolve()
            self.scratch = self._claim(self.path, SCRATCH)
        except OSError as error:
            raise AccelError(explain_os_error(error)) from None
        self.gradio = self.scratch / "gradio"
        self.gradio.mkdir()
        tempfile.tempdir, os.environ["GRADIO_TEMP_DIR"] = str(self.scratch), str(self.gradio)
        atexit.register(self.close)

    def close(self) -> None:
        """Remove the scratch folder, and DATA if it is temporary."""
        atexit.unregister(self.close)
        tempfile.tempdir, gradio = self._before
        os.environ.pop("GRADIO_TEMP_DIR", None)
        if gradio is not None:
            os.environ["GRADIO_TEMP_DIR"] = gradio
        folder = self.path if self.temporary else self.scratch
        for _ in range(2):  # a thread may have written a file in the meantime
            shutil.rmtree(folder, ignore_errors=True)
        for lock in self._locks:
            lock.close()

    def prune_gradio(self, max_files: int) -> None:
        """Remove the oldest files of Gradio's folder beyond a number; the page itself puts none there."""
        files = sorted((f for f in self.gradio.rglob("*") if f.is_file()), key=_age)
        for file in files[: max(0, len(files) - max_files)]:
            if file.parent == self.gradio:  # a form that was not understood
                file.unlink(missing_ok=True)
            else:
                shutil.rmtree(file.parent, ignore_errors=True)  # Gradio gives each file a folder of its own

    def _claim(self, parent: Path, prefix: str) -> Path:
        """A new folder that holds this process's lock; abandoned ones of the same prefix are removed."""
        for folder in parent.glob(f"{prefix}*"):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = (folder / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._locks.append(lock)
        return folder


def _age(file: Path) -> float:
    """When a file was written; 0 if another thread has just removed it."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder is this user's own and its process has ended."""
    try:
        state = folder.lstat()
        if folder.is_symlink() or not folder.is_dir() or state.st_uid != os.getuid():
            return False
        if not (folder / LOCK).is_file():
            return time.time() - state.st_mtime > YOUNG_SECONDS
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # locked, or removed by another process
        return False
