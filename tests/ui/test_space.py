"""The page as a Space: ZeroGPU by a stand-in for the package `spaces`, and what the Space installs."""

import importlib
import multiprocessing
import os
import pickle
import re
import sys
import threading
from contextvars import ContextVar
from types import SimpleNamespace

import gradio as gr
import pytest
import yaml
from gradio_client import Client

import app
from accel.errors import AccelError
from accel.runtime.models import TINY, model_defaults, read_defaults
from accel.runtime.paths import ROOT
from accel.runtime.run import Cancelled, build_run
from ui import model_list, zero_gpu
from ui.job_queue import Job
from ui.server import Options, launch

PAGES_PROCESS = os.getpid()
visitors_token = ContextVar("visitors_token", default="")


class Spaces:
    """Runs what is decorated in a forked process; `asked` has the seconds and the visitor of each call."""

    def __init__(self):
        self.asked, self.refusal = [], ""

    def GPU(self, function, duration):  # noqa: N802
        def call(*args):
            self.asked.append((duration(*args), visitors_token.get()))
            if self.refusal:
                raise gr.Error(self.refusal)
            crossing = pickle.loads(pickle.dumps(args))
            process = multiprocessing.get_context("fork").Process(target=function, args=crossing)
            process.start()
            process.join()

        return call


@pytest.fixture(scope="module")
def spaces():
    """The stand-in; the page takes itself for one on ZeroGPU."""
    stand_in = Spaces()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=stand_in.GPU))
        patch.setenv("SPACES_ZERO_GPU", "true")
        importlib.reload(zero_gpu)
        yield stand_in
    importlib.reload(zero_gpu)


@pytest.fixture
def asked(spaces):
    """The seconds that a test asks for, with the visitor's token."""
    spaces.asked.clear()
    spaces.refusal = ""
    return spaces.asked


@pytest.fixture(scope="module")
def server(spaces, tmp_path_factory):
    """The page with the shipped model at a small size."""
    folder = tmp_path_factory.mktemp("model")
    for part in (ROOT / TINY).iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "accel.json").unlink()
    small = read_defaults(TINY).model_copy(update={"height": 32, "width": 32, "frames": 5})
    (folder / "accel.json").write_text(small.model_dump_json())
    server = launch(app.Page, Options(str(folder)), quiet=True)
    yield server
    server.close()


def generate(server, steps: int) -> list[dict]:
    """What the endpoint tells while it compares two plain runs."""
    client = Client(server.url, verbose=False)
    job = client.submit("a red star", 1, {"preset": "plain", "steps": steps}, {"steps": 2}, api_name="/run")
    job.result()
    client.close()
    return job.outputs()


class Task:
    """Computes something in the GPU's process. `what`: "where", "for ever", or an exception."""

    def __init__(self, what):
        self.what, self.runs = what, [build_run(model_defaults(None, TINY), model=TINY, prompt="a star", steps=2)]

    def __call__(self, job, pipe, defaults):
        job.emit("step", done=1)
        if isinstance(self.what, Exception):
            raise self.what
        while self.what == "for ever":
            job.check()
        return os.getpid(), type(pipe).__name__, defaults


def compute(task: Task, job: Job, monkeypatch):
    monkeypatch.setattr(zero_gpu, "gpu_seconds", lambda *_: 7)
    return zero_gpu.compute(task, job, None, None, None)


@pytest.fixture
def job():
    return Job(None, "me", TINY)


def test_the_page_compares_in_a_process_that_has_the_gpu_and_asks_for_less_where_the_reference_is_kept(
    server, asked, monkeypatch
):
    monkeypatch.setattr(server.page.context.workers, "step_seconds", lambda run: 1.0)
    first, second = generate(server, 2), generate(server, 3)
    assert [told["state"] for told in first if told["state"] != "waiting"][0] == "step"
    assert first[-1]["state"] == second[-1]["state"] == "done"
    assert first[-1]["report"]["bit_equal"] and second[-1]["report"]["baseline_measured_at"]
    assert [seconds for seconds, _ in asked] == [15 + 8, 15 + 7]  # (2 + 2 + 2) * 1.25, (2 + 3) * 1.25
    assert server.page.context.store.find(second[-1]["run_id"]).folder.joinpath("b.mp4").stat().st_size > 0


def test_a_task_sends_its_events_and_its_result_from_another_process(asked, job, monkeypatch):
    process, pipe, defaults = compute(Task("where"), job, monkeypatch)
    assert process != PAGES_PROCESS and pipe == "WanPipeline" and defaults.toy_world
    assert job.events.get_nowait() == ("step", {"done": 1}) and job.events.empty()


def test_stop_ends_a_task_in_the_other_process(asked, job, monkeypatch):
    threading.Timer(0.3, job.stop.set).start()
    with pytest.raises(Cancelled):
        compute(Task("for ever"), job, monkeypatch)


@pytest.mark.parametrize("error", [AccelError("no such size"), MemoryError("full"), KeyError("bug")])
def test_an_error_crosses_with_its_kind_and_its_traceback(asked, job, monkeypatch, error):
    with pytest.raises(type(error)) as raised:
        compute(Task(error), job, monkeypatch)
    assert raised.value.args == error.args and "in __call__" in raised.value.__notes__[0]


def test_a_refusal_of_zero_gpu_is_a_sentence_with_the_seconds(spaces, asked, job, monkeypatch):
    spaces.refusal = "You have exceeded your quota. "
    with pytest.raises(AccelError, match=r"^You have exceeded your quota \(7 s of GPU time were asked for\)$"):
        compute(Task("where"), job, monkeypatch)


def test_the_seconds_are_taken_from_the_quota_of_the_visitor_who_pressed_run(asked, monkeypatch):
    token = visitors_token.set("visitor")
    job = Job(None, "me", TINY)
    visitors_token.reset(token)
    compute(Task("where"), job, monkeypatch)
    assert asked == [(7, "visitor")]


def test_the_seconds_come_from_steps_model_and_both_sides(tiny_wan):
    run = lambda **more: build_run(model_defaults(tiny_wan, TINY), model=TINY, prompt="a star", **more)
    a, b = run(steps=10), run(steps=5, guidance=1.0)
    tenth = lambda run: 0.1 if run.guidance > 1 else None  # an unguided step is half of it
    assert zero_gpu.gpu_seconds([a, b], tiny_wan, tenth) == 15 + 2  # (0.1 + 1 + 0.25) * 1.25
    assert zero_gpu.gpu_seconds([run(steps=500), a], tiny_wan, tenth) == 15 + 64  # (0.2 + 50 + 1) * 1.25
    large = run(steps=500, height=512, width=512)
    assert zero_gpu.gpu_seconds([run(steps=500)], tiny_wan, lambda run: None) < 15 + 10
    assert zero_gpu.gpu_seconds([large], tiny_wan, lambda run: None) > 15 + 60  # by its FLOPs


def test_on_zero_gpu_the_models_are_offered_that_fit_into_its_memory(spaces, monkeypatch):
    monkeypatch.setattr(model_list, "hub_answers", lambda: True)
    usable = [choice.id for choice in model_list.model_choices() if choice.usable]
    assert usable == [TINY, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"]


def test_threads_that_wait_leave_the_cores_to_others():
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def pins(file) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\d.]+)$", file.read_text().split("# Tests")[0], re.MULTILINE))


def front_matter(file) -> dict:
    return yaml.safe_load(file.read_text().split("---\n")[1])


def test_a_space_installs_the_pinned_versions_and_those_that_zero_gpu_accepts():
    here, there = pins(ROOT / "requirements.txt"), pins(ROOT / "space" / "requirements.txt")
    assert (2, 8) <= tuple(map(int, there.pop("torch").split(".")[:2])) <= (2, 11)
    assert {"torch": here["torch"], "gradio": here["gradio"], **there} == here
    fronts = [front_matter(ROOT / folder / "README.md") for folder in (".", "space")]
    assert {front["sdk_version"] for front in fronts} == {here["gradio"]} and fronts[1]["python_version"] == "3.12"
    assert all(len(front["short_description"]) <= 60 and front["app_file"] == "app.py" for front in fronts)
