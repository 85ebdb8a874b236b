"""Runs many short pairs on a server and tells whether its memory, its open files and its folder stay as they are.

python tests/ui/soak.py [--runs 200]

Prints one JSON line and exits with 1 if anything has grown by more than 5 %. Each run is of a new visitor in a new
session; every tenth is refused and every tenth stopped. Each visitor deletes its pair, so that nothing is to stay.
What has a bound is brought to it first: the sessions that the server keeps, and its cache of references.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gradio_client import Client
from gradio_client.exceptions import AppError

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from ui.server import MAX_SESSIONS  # noqa: E402

PRESETS = ("fastercache", "asymrnr", "combined", "turbo", "plain")
WARM_UP = 0.25  # share of the runs after which the first measure is taken
TOLERANCE = 1.05
START_SECONDS = 300
LOG = ".sqlite-wal"  # SQLite lets it grow to 4 MB before it begins it anew


def main() -> None:
    """Start a server in a folder of its own, run the pairs, measure twice."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        server, client = start(Path(folder))
        try:
            for i in range(MAX_SESSIONS):
                client.reset_session()
                client.predict(f"early-{i}", 1, api_name="/history")
            for i in range(runs):
                if i == int(runs * WARM_UP):
                    first = measure(server.pid, Path(folder))
                short_run(client, i)
            last = measure(server.pid, Path(folder))
        finally:
            server.terminate()
            server.wait(60)
        left = sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())
    flat = all(last[name] <= TOLERANCE * first[name] for name in first)
    print(json.dumps({"runs": runs, "first": first, "last": last, "flat": flat, "left": left}))
    sys.exit(not flat)


def start(folder: Path) -> tuple[subprocess.Popen, Client]:
    """A server whose files are in a folder, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port), "--data", str(folder)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            return server, Client(f"http://127.0.0.1:{port}", verbose=False)
        except Exception:
            if server.poll() is not None or time.monotonic() > end:
                server.kill()
                raise
            time.sleep(0.5)


def short_run(client: Client, i: int) -> None:
    """The i-th pair, in a session and of a visitor of its own, which deletes it afterwards."""
    client.reset_session()
    visitor, side = f"visitor-{i}", {"preset": PRESETS[i % len(PRESETS)]}
    side |= {} if side["preset"] == "turbo" else {"steps": 2 + i % 3}
    prompt = "" if i % 10 == 7 else "a large red star spins slowly"
    job = client.submit(prompt, i, side, {"steps": 2}, "", visitor, api_name="/run")
    if i % 10 == 3:
        client.predict(visitor, api_name="/stop")
    try:
        results = list(job)
    except AppError:
        results = []
    for result in results:
        if result["state"] == "done":
            client.predict(visitor, result["run_id"], api_name="/delete_run")


def measure(pid: int, folder: Path) -> dict[str, int]:
    """Memory and open files of a process, and what is in a folder."""
    status = Path(f"/proc/{pid}/status").read_text()
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != LOG]
    return {
        "rss_kb": int(status.split("VmRSS:")[1].split()[0]),
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "data_files": len(files),
        "data_bytes": sum(file.stat().st_size for file in files),
    }


if __name__ == "__main__":
    main()
