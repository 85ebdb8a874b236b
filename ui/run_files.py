"""Serves the files of stored and of recorded pairs, by their names alone: no path of a request is ever opened."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from accel.errors import AccelError
from ui.store import Store

FILES = {"a.mp4": "video/mp4", "b.mp4": "video/mp4", "a.jpg": "image/jpeg", "b.jpg": "image/jpeg",
         "run.json": "application/json"}  # fmt: skip
HEADERS = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
REPORTS_AT_ONCE = 2  # each encodes a video


def run_file_routes(store: Store, recorded: Path) -> list[Route]:
    """`runs/<id>/<file>` and `recorded/<name>/<file>`. `recorded`: the folder of the recorded pairs."""
    folders = {folder.name: folder for folder in recorded.iterdir()} if recorded.is_dir() else {}
    reports = Reports(recorded)

    def stored_folder(name: str) -> Path | None:
        stored = store.find(name)
        return stored and stored.folder

    return [
        Route("/runs/{pair}/{name}", _respond(stored_folder, reports)),
        Route("/recorded/{pair}/{name}", _respond(folders.get, reports)),
    ]


class Reports:
    """Makes reports when they are asked for, a few at once; those of recorded pairs once."""

    def __init__(self, recorded: Path):
        """`recorded`: the folder of the recorded pairs, which do not change."""
        self._recorded, self._made = recorded, {}
        self._slots = threading.Semaphore(REPORTS_AT_ONCE)

    def respond(self, folder: Path) -> Response:
        """The zip of a pair's folder; 503 if too many are being made."""
        report = self._made.get(folder)
        if report is None:
            if not self._slots.acquire(blocking=False):
                return PlainTextResponse("Other reports are being made: try again in a few seconds.", 503)
            try:
                report = _make_report(folder)
            finally:
                self._slots.release()
            if folder.parent == self._recorded:
                self._made[folder] = report
        headers = {**HEADERS, "Content-Disposition": 'attachment; filename="report.zip"'}
        return Response(report, media_type="application/zip", headers=headers)


def _make_report(folder: Path) -> bytes:
    from accel.evaluation.pair_report import write_report

    with tempfile.TemporaryDirectory(prefix="report-") as made:
        write_report(folder, Path(made) / "report.zip")
        return (Path(made) / "report.zip").read_bytes()


def _respond(folder_of: Callable[[str], Path | None], reports: Reports) -> Callable[[Request], Response]:
    """The handler of a pair's files; Starlette calls it in a thread."""

    def respond(request: Request) -> Response:
        folder, name = folder_of(request.path_params["pair"]), request.path_params["name"]
        try:
            if folder is not None and name == "report.zip":
                return reports.respond(folder)
        except AccelError:  # its text may name the folder
            return PlainTextResponse("This pair has no report.", 404)
        if folder is None or name not in FILES or not (folder / name).is_file():
            return PlainTextResponse("There is no such file.", 404)
        return FileResponse(folder / name, media_type=FILES[name], headers=HEADERS)

    return respond
