"""What the server serves and refuses, and that it ends cleanly; without a browser."""

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from small_page import SmallPage
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from accel.errors import AccelError
from accel.runtime.paths import ROOT
from ui.data_folder import SCRATCH, TEMPORARY, DataFolder
from ui.request_limits import MAX_REQUEST, MAX_UPLOAD_REQUEST, RequestLimits
from ui.run_files import run_file_routes
from ui.server import MAX_FILES, MAX_SESSIONS, Options, launch, parse_arguments
from ui.store import Store

RECORDED = ROOT / "examples" / "runs"
PAIR = next(RECORDED.glob("*/run.json")).parent
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture
def data(tmp_path):
    folder = DataFolder(tmp_path / "data")
    yield folder
    folder.close()


@pytest.fixture
def store(data):
    store = Store(data.path)
    yield store
    store.close()


async def read_body(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def limited(host: str = "127.0.0.1", allow_hosts=("testserver", "box.lan"), routes=(), **more) -> TestClient:
    """A client of a server that answers POST /post with the length of the body, behind the limits."""
    routes = [*routes, Route("/post", read_body, methods=["POST"])]
    limits = Middleware(RequestLimits, host, allow_hosts, **more)
    return TestClient(Starlette(routes=routes, middleware=[limits]), raise_server_exceptions=False)


@pytest.fixture
def client(store):
    return limited(routes=run_file_routes(store, RECORDED))


@pytest.fixture
def run_id(store):
    report = json.loads((PAIR / "run.json").read_text())
    return store.add("me", report, {name: (PAIR / name).read_bytes() for name in ("a.mp4", "b.mp4")})


# Files of pairs


def test_a_video_is_served_whole_and_in_parts(client, run_id):
    video = (PAIR / "a.mp4").read_bytes()
    for address in (f"/runs/{run_id}/a.mp4", f"/recorded/{PAIR.name}/a.mp4"):
        assert client.get(address).content == video
        part = client.get(address, headers={"Range": "bytes=10-19"})
        assert part.status_code == 206 and part.content == video[10:20]
        assert part.headers["content-type"] == "video/mp4"


@pytest.mark.parametrize("path", [
    "/runs/{id}/page.sqlite", "/runs/{id}/..%2F..%2Fpage.sqlite", "/runs/..%2F{id}/a.mp4", "/runs/{id}/c.mp4",
    "/runs/00000000000000000000000000000000/a.mp4", "/runs/{id}/", "/runs/%2e%2e/page.sqlite", "/runs/{id}/a.jpg",
    "/recorded/..%2F..%2Fapp.py/a.mp4", "/recorded/%2e%2e/prompts/toy.txt", "/recorded/{id}/a.mp4",
    "/runs/{id}/a.mp4%00", "/runs/{id}%2F..%2F{id}/a.mp4", "/recorded/balanced/..%2F..%2F..%2Fapp.py",
])  # fmt: skip
def test_nothing_else_is_served(client, run_id, path):
    assert client.get(path.format(id=run_id)).status_code == 404


def test_a_report_is_made_on_request_and_leaves_no_file(client, run_id, data):
    before = sorted(data.path.rglob("*"))
    assert client.get(f"/runs/{run_id}/report.zip").content[:2] == b"PK"
    client.get(f"/runs/{run_id}/report.zip", headers={"Range": "bytes=999999999-"})
    assert sorted(data.path.rglob("*")) == before


def test_a_damaged_pair_has_no_report_and_no_path_is_told(client, store, run_id):
    (store.find(run_id).folder / "run.json").write_text("{")
    answer = client.get(f"/runs/{run_id}/report.zip")
    assert (answer.status_code, answer.text) == (404, "This pair has no report.")


# Limits


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("LOCALHOST:7860", 200), ("127.0.0.1:1", 200), ("[::1]:7860", 200), ("box.lan", 200),
    ("user-space.hf.space", 200), ("abc.gradio.live", 200), ("evil.example", 403), ("localhost.evil.example", 403),
    ("hf.space.evil.example", 403), ("hf.space", 403), ("192.168.1.5", 403), ("", 403), ("box.lan.", 403),
])  # fmt: skip
def test_only_known_host_names_are_answered(host, status):
    assert limited().post("/post", content=b"x", headers={"Host": host}).status_code == status


def test_a_server_on_all_addresses_answers_to_every_address_but_to_no_other_name():
    hosts = ["192.168.1.5:7860", "[fe80::1]:7860", "evil.example"]
    answers = [limited("0.0.0.0").post("/post", content=b"x", headers={"Host": host}) for host in hosts]
    assert [answer.status_code for answer in answers] == [200, 200, 403]
    assert (
        answers[-1].text == "This page does not answer to that host name; its owner can add it with --allow-host NAME."
    )


@pytest.mark.parametrize("headers, limit", [({}, MAX_REQUEST), (FORM, MAX_UPLOAD_REQUEST)], ids=["text", "form"])
def test_a_large_body_is_refused_with_and_without_its_length(headers, limit):
    client = limited()
    assert client.post("/post", content=b"x" * limit, headers=headers).text == str(limit)
    parts = (b"x" * (limit // 4) for _ in range(5))
    for content in (b"x" * (limit + 1), parts):
        answer = client.post("/post", content=content, headers=headers)
        assert (answer.status_code, answer.text) == (413, f"A request may have at most {limit // 1024} KB.")


@pytest.mark.parametrize("path", [
    "/gradio_api/deep_link", "/gradio_api/proxy=https://x.hf.space/", "/gradio_api/file=https://example.com/a.png",
    "/gradio_api/process_recording", "/gradio_api/vibe-edit/", "/monitoring/summary", "/gradio_api/stream/1",
])  # fmt: skip
def test_parts_of_gradio_that_write_or_fetch_are_not_there(path):
    assert limited().get(path).text == "The page has no such address."


# The folder of the page's files


def test_the_folders_of_crashed_processes_are_removed_and_those_of_living_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    crash = "import os; from ui.data_folder import DataFolder; print(DataFolder().path, flush=True); os._exit(1)"
    dead = subprocess.run(
        [sys.executable, "-c", crash], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    ).stdout
    assert os.path.isdir(dead.strip())
    alive = DataFolder()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # `alive` has replaced it
    other = DataFolder()
    assert not os.path.isdir(dead.strip()) and alive.path.is_dir() and other.path.is_dir()
    other.close(), alive.close()
    assert not list(tmp_path.glob(TEMPORARY + "*"))


def test_a_folder_that_was_asked_for_keeps_its_files_and_loses_the_temporary_ones(tmp_path):
    data = DataFolder(tmp_path / "data")
    (data.path / "page.sqlite").touch(), (data.gradio / "x").touch()
    data.close()
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["page.sqlite"]


def test_links_of_others_are_not_followed_when_folders_are_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{SCRATCH}x").symlink_to(tmp_path / "mine")
    os.utime(tmp_path / "mine", (0, 0))
    DataFolder(tmp_path / "data").close()
    assert (tmp_path / "mine").is_dir()


def test_temporary_files_of_the_process_go_to_the_scratch_folder_until_the_end(tmp_path):
    import tempfile

    before = tempfile.gettempdir()
    data = DataFolder(tmp_path / "data")
    assert tempfile.gettempdir() == str(data.scratch) and os.environ["GRADIO_TEMP_DIR"] == str(data.gradio)
    data.close()
    assert tempfile.gettempdir() == before


def test_a_folder_that_cannot_be_used_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AccelError, match="exists already|is not a folder"):
        DataFolder(tmp_path / "file")


def test_the_oldest_uploads_are_removed(data):
    for i in range(4):
        (data.gradio / str(i)).mkdir()
        (data.gradio / str(i) / "preset.yaml").touch()
        os.utime(data.gradio / str(i) / "preset.yaml", (i, i))
    data.prune_gradio(2)
    assert sorted(folder.name for folder in data.gradio.iterdir()) == ["2", "3"]
    (data.gradio / "part-of-a-wrong-form").touch()
    data.prune_gradio(0)
    assert data.gradio.is_dir() and not any(data.gradio.iterdir())


# The whole server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A small page behind everything that `launch` puts around one; its model is never loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ui.worker.Workers.start", lambda self: None)
        options = Options(data=tmp_path_factory.mktemp("server"), port=free_port())
        server = launch(SmallPage, options, quiet=True)
        yield server
        server.close()


def test_the_database_and_other_files_are_not_served_by_gradio(server):
    data = server.page.context.store.folder
    for path in (data / "page.sqlite", ROOT / "pyproject.toml", "/etc/hostname", "runs/x"):
        assert httpx.get(f"{server.url}gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.slow
def test_an_upload_that_is_too_large_is_refused_and_small_ones_do_not_fill_the_disk(server):
    upload = lambda size: httpx.post(f"{server.url}gradio_api/upload", files={"files": ("x.yaml", os.urandom(size))})
    assert upload(2**21).status_code == 413
    assert upload(2**17).status_code >= 400
    for _ in range(MAX_FILES + 20):
        assert upload(10).status_code == 200
    gradio = os.environ["GRADIO_TEMP_DIR"]
    assert sum(len(files) for *_, files in os.walk(gradio)) <= MAX_FILES + 1


def test_a_large_text_is_refused_before_it_is_stored_and_sessions_are_bounded(server):
    send = lambda session, text: httpx.post(
        f"{server.url}gradio_api/run/echo", json={"data": [text], "session_hash": session}
    )
    sessions = server.page.demo.state_holder
    assert send("large", "x" * 2**17).status_code == 413 and "large" not in sessions
    assert send("small", "hello").json()["data"] == ["hello"] and "small" in sessions
    assert sessions.capacity == MAX_SESSIONS


def test_a_foreign_host_name_is_refused_by_the_whole_server(server):
    answer = httpx.get(server.url, headers={"Host": "evil.example"})
    assert answer.status_code == 403 and "--allow-host" in answer.text


@pytest.mark.parametrize("moment", ["at once", pytest.param("in a run", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "SIGINT"]
)
def test_the_server_ends_cleanly_and_leaves_no_files(tmp_path, number, moment):
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE.format(port=free_port(), busy=moment == "in a run")], cwd=ROOT,
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        while "ready" not in (line := server.stdout.readline()):
            assert line, "the server has ended"
        assert list(tmp_path.glob(TEMPORARY + "*"))
        server.send_signal(number)
        output, _ = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0, output
    assert "Traceback" not in output and not list(tmp_path.iterdir())


SERVE = """
import threading
import ui.server
from small_page import SmallPage
from ui.server import Options, launch, serve

def launch_busy(*args, launch=launch):
    server, running = launch(*args), threading.Event()
    def work(job, pipe, defaults):
        from accel.runtime.generate import generate
        from accel.runtime.run import build_run
        run = build_run(defaults, model=job.model, prompt="a red ring", steps=1000)
        generate(run, pipe, defaults, lambda *_: (running.set(), job.check()))
    if {busy}:
        server.page.context.workers.submit(work)
        running.wait()
    print("ready", flush=True)
    return server
ui.server.launch = launch_busy
serve(SmallPage, Options(port={port}))
"""


def test_a_port_in_use_ends_the_command_with_a_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = "from small_page import SmallPage; from ui.server import Options, serve;"
        code += f"serve(SmallPage, Options(port={port}))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: port {port} is in use: choose another one with --port"
    assert not list(tmp_path.iterdir())


def test_devices_and_hosts_come_from_the_command_line():
    options = parse_arguments(["--devices", "cuda:0,cuda:1", "--allow-host", "box.lan", "--port", "1"])
    assert options.devices == ("cuda:0", "cuda:1") and options.allow_hosts == ("box.lan",)
    assert parse_arguments([]).devices == (None,)


def test_a_space_names_its_folder_and_the_owners_key_by_its_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_DATA", str(tmp_path))
    monkeypatch.setenv("ACCEL_OWNER_KEY", "key")
    options = parse_arguments([])
    assert (options.data, options.owner_key) == (tmp_path, "key")
    assert parse_arguments(["--owner-key", "other"]).owner_key == "other"


@pytest.mark.parametrize("devices", ["gpu", "cuda:0,cuda:0", "cuda:0,cpu"])
def test_devices_that_do_not_exist_or_cannot_be_compared_are_refused(devices, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--devices", devices])
    assert ended.value.code == 2 and "device" in capsys.readouterr().err


def environment(temporary) -> dict:
    """The environment of a process that writes its temporary files to a folder and finds `small_page`."""
    own = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    return {**own, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
