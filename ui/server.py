"""Starts the page: arguments, what is served, limits on requests, and a clean end."""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.errors import AccelError
from accel.runtime.models import TINY
from accel.runtime.paths import ROOT

MAX_FILE = 64 * 2**10  # bytes of an uploaded preset
MAX_FILES = 100  # uploaded ones that are kept
MAX_SESSIONS = 200  # whose inputs and states Gradio keeps
MAX_EVENTS = 60  # of the page that wait for a thread
CACHE_SECONDS = (600, 3600)  # how often Gradio looks through its own folder, and the age of what goes
STREAM_SECONDS = 1  # that open pages get to end their streams when the server is stopped
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True)
class Options:
    """How the page is served."""

    model: str = TINY
    models: Path | None = None  # folder of further pipelines
    data: Path | None = None  # None: a temporary folder, removed at the end
    devices: tuple[str | None, ...] = (None,)
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    allow_hosts: tuple[str, ...] = ()
    owner_key: str = ""


def parse_arguments(arguments: list[str] | None = None) -> Options:
    """The options of a command line; a wrong one ends the process with a sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Serve the page that compares accelerated videos with their references."
    )
    add = parser.add_argument
    add("--model", default=TINY, help="folder or Hugging Face id of the pipeline to begin with")
    add("--models", type=Path, metavar="DIR", help="folder of further pipelines that visitors may choose")
    add("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="0.0.0.0 serves the network too")
    add("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    add("--share", action="store_true", help="open a public link; anybody who has it can use this machine")
    add("--devices", default="", help="such as cuda:0,cuda:1: one run at a time on each; default: the GPU, or the CPU")
    add("--data", type=Path, metavar="DIR", default=os.environ.get("ACCEL_DATA") or None,
        help="folder of the history and votes; default: one that is removed at end")  # fmt: skip
    add("--allow-host", action="append", default=[], metavar="NAME", help="a name that the page answers to; repeatable")
    add(
        "--owner-key",
        default=os.environ.get("ACCEL_OWNER_KEY", ""),
        help="the page at ?owner=KEY shows the runs of all visitors; default: a random key",
    )
    args = parser.parse_args(arguments)
    devices = tuple(filter(None, args.devices.split(","))) or (None,)
    if wrong := [device for device in devices if device and not DEVICE.fullmatch(device)]:
        parser.error(f"{wrong[0]!r} is not a device; devices are cpu, mps, cuda, cuda:0, cuda:1 and so on")
    if len(set(devices)) < len(devices):
        parser.error("a device is named twice; each can do one run at a time")
    if len({device and device.partition(":")[0] for device in devices}) > 1:
        parser.error("the devices are of different kinds; a speed-up compares two runs on one kind")
    return Options(args.model, args.models, args.data, devices, args.host, args.port, args.share,
                   tuple(args.allow_host), args.owner_key)  # fmt: skip


def serve(page_class: type, options: Options) -> None:
    """Serve the page until it is interrupted or terminated; its temporary files are gone afterwards.

    Does not return: the process ends with exit code 0, or 2 if the page cannot be served.
    """
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server, code = None, 0
    try:
        server = launch(page_class, options)
        print(f"The runs of all visitors: {server.url}?owner={server.owner_key}", flush=True)
        ended.wait()
    except AccelError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    if server:
        server.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch aborts the process if a run still goes on when the interpreter ends


@dataclass(frozen=True)
class Server:
    """A page that is being served: its `app.Page`, its address, and the function that ends it."""

    page: Any
    url: str
    owner_key: str
    close: Callable[[], None]


def launch(page_class: type, options: Options, quiet: bool = False) -> Server:
    """Start the server; the models load in the background.

    `page_class(context)` has `build()`, `css`, `theme()` and `routes()`, see `app.Page`. Raises AccelError if the page
    cannot be served; nothing is left then.
    """
    from ui.data_folder import DataFolder

    data = DataFolder(options.data)
    try:
        return _launch(page_class, options, data, quiet)
    except BaseException:
        data.close()
        raise


def _launch(page_class: type, options: Options, data, quiet: bool) -> Server:
    import gradio.routes
    from starlette.middleware import Middleware

    from ui.context import Context
    from ui.model_list import model_choices
    from ui.recorded import recorded_pairs
    from ui.request_limits import RequestLimits
    from ui.run_files import run_file_routes
    from ui.store import Store
    from ui.worker import Workers

    models = model_choices(options.model, options.models)
    workers = Workers(options.model, options.devices, {model.id: model.reason for model in models})
    for pair in recorded_pairs():
        workers.note_work(pair.report)
    key = options.owner_key or secrets.token_urlsafe(12)
    store = Store(data.path)
    gradio.routes.DEFAULT_TEMP_DIR = str(data.gradio)  # Gradio creates a folder there, and has read it too early
    page = page_class(Context(options.model, workers, store, models=models, owner_key=key))
    demo = page.build()
    demo.delete_cache = CACHE_SECONDS
    limits = Middleware(RequestLimits, options.host, options.allow_hosts, lambda: data.prune_gradio(MAX_FILES))
    routes = [*page.routes(), *run_file_routes(store, ROOT / "examples" / "runs")]
    try:
        demo.queue(max_size=MAX_EVENTS).launch(
            server_name=options.host, server_port=options.port, share=options.share, prevent_thread_lock=True,
            quiet=quiet, head=f"<style>{page.css}</style>", theme=page.theme(), footer_links=["api", "settings"],
            ssr_mode=False,
            max_file_size=MAX_FILE, state_session_capacity=MAX_SESSIONS, run_history=False, enable_monitoring=False,
            app_kwargs={"routes": routes, "middleware": [limits]},
        )  # fmt: skip
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise AccelError(f"port {options.port} is in use: choose another one with --port") from None

    def close() -> None:
        workers.close()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would list the streams of open pages
        demo.server.config.timeout_graceful_shutdown = STREAM_SECONDS
        demo.close(verbose=False)
        store.close()
        data.close()

    workers.start()  # not earlier: importing torch would delay the first answer
    return Server(page, demo.local_url, key, close)
