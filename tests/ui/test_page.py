"""The page without a browser: controls from fields, the line before the worker, the timeline, stored pairs."""

import threading
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch

import app
from accel.core.trace import Step, Trace
from accel.methods import METHODS
from accel.runtime.generate import Video, build_run, generate
from accel.runtime.models import ROOT, TINY, ModelDefaults, read_defaults
from ui import controls
from ui.compare import CompareJob, VideoCache
from ui.panels import metric_cards
from ui.player import ABPlayer
from ui.snippet import snippet
from ui.timeline import ACTION_STYLE, timeline
from ui.token_maps import token_maps
from ui.worker import Worker


@pytest.mark.parametrize("name", METHODS)
def test_every_field_has_a_widget_with_its_range_and_help(name):
    with gr.Blocks():
        made = controls.widgets(METHODS[name]())
    assert list(made) == list(METHODS[name].parameters())
    for field, schema in METHODS[name].parameters().items():
        assert made[field].info == schema["description"] and made[field].value == schema["default"]
        if "maximum" in schema:
            assert (made[field].minimum, made[field].maximum) == (schema["minimum"], schema["maximum"])


def test_slider_values_become_settings_that_the_method_takes():
    method = METHODS["fastercache"]
    values = {knob: getattr(method(), knob) for knob in method.parameters()} | {"attention_interval": 3.0}
    assert method(**controls.settings(method, values)).attention_interval == 3


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr("ui.worker.load_pipeline", lambda model: SimpleNamespace())
    monkeypatch.setattr("ui.worker.model_defaults", lambda pipe, model: None)
    return Worker("none")


def kinds(worker, job) -> list[str]:
    return [kind for kind, _ in worker.stream(job) if kind != "waiting"]


def test_jobs_run_one_after_the_other_and_the_second_sees_that_it_waits(worker):
    gate = threading.Event()
    first = worker.submit(lambda job, pipe, defaults: gate.wait(5))
    second = worker.submit(lambda job, pipe, defaults: job.emit("hello"))
    kind, data = next(worker.stream(second))
    assert kind == "waiting" and data["ahead"] == 1
    gate.set()
    third = worker.submit(lambda job, pipe, defaults: job.emit("hello"))
    assert kinds(worker, first) == ["done"] and kinds(worker, third) == ["hello", "done"]


def endless(job, pipe, defaults):
    while True:
        job.emit("step")


def test_stop_ends_a_job_at_its_next_event_and_the_next_one_runs(worker):
    job = worker.submit(endless)
    stream = worker.stream(job)
    assert next(stream)[0] == "step"
    job.stop.set()
    assert [kind for kind, _ in stream][-1] == "stopped"
    assert kinds(worker, worker.submit(lambda *a: None)) == ["done"]


def test_a_slow_step_is_told_to_be_stopping_before_it_has_stopped(worker):
    began, gate = threading.Event(), threading.Event()
    job = worker.submit(lambda job, *_: (began.set(), gate.wait(5), job.emit("step")))
    assert began.wait(5)
    job.stop.set()
    stream = worker.stream(job)
    assert next(stream)[0] == "stopping"
    gate.set()
    assert [kind for kind, _ in stream][-1] == "stopped"


def test_stop_while_the_model_is_loading_ends_the_job_at_once(monkeypatch):
    gate, ran = threading.Event(), []
    monkeypatch.setattr("ui.worker.load_pipeline", lambda model: gate.wait(5))
    monkeypatch.setattr("ui.worker.model_defaults", lambda pipe, model: None)
    worker = Worker("none")
    job = worker.submit(lambda *a: ran.append(1))
    stream = worker.stream(job)
    assert next(stream) == ("waiting", {"ahead": 0, "loading": True})
    job.stop.set()
    assert [kind for kind, _ in stream] == ["stopped"] and not gate.is_set()
    gate.set()
    assert kinds(worker, worker.submit(lambda *a: None)) == ["done"] and not ran


def test_a_line_that_is_full_takes_no_more_and_those_in_it_are_served(worker, monkeypatch):
    monkeypatch.setattr("ui.worker.MAX_QUEUE", 1)
    began, gate = threading.Event(), threading.Event()
    first = worker.submit(lambda *a: (began.set(), gate.wait(5)))
    assert began.wait(5)
    second, third = (worker.submit(lambda *a: None) for _ in range(2))
    assert list(worker.stream(third)) == [("refused", {"why": "1 runs are waiting already: try again later"})]
    gate.set()
    assert kinds(worker, first) == kinds(worker, second) == ["done"]


def test_a_visitor_who_leaves_stops_the_job(worker):
    job = worker.submit(endless)
    stream = worker.stream(job)
    next(stream)
    stream.close()
    assert job.stop.is_set()
    assert kinds(worker, worker.submit(lambda *a: None)) == ["done"]


def test_bad_input_is_told_and_unknown_errors_get_a_number(worker, caplog):
    def refuse(job, pipe, defaults):
        raise ValueError("the prompt is empty")

    def break_(job, pipe, defaults):
        raise KeyError("secret path")

    assert list(worker.stream(worker.submit(refuse)))[-1] == ("refused", {"why": "the prompt is empty"})
    kind, data = list(worker.stream(worker.submit(break_)))[-1]
    assert kind == "failed" and "secret" not in str(data) and data["name"] in caplog.text


def test_a_model_that_cannot_be_loaded_is_told_to_every_visitor(monkeypatch):
    def missing(model):
        raise ValueError("no model folder 'none'")

    monkeypatch.setattr("ui.worker.load_pipeline", missing)
    worker = Worker("none")
    assert list(worker.stream(worker.submit(lambda *a: None)))[-1] == ("refused", {"why": "no model folder 'none'"})


def test_maps_show_the_rate_of_each_step_and_the_tokens_that_stay():
    told = {"core_share": 0.4, "forecast": 1.3, "overhead_ms": 5.0, "full_attention_ms": 2.0}
    told["rates"] = {"a": [[0, 0], [0.5, 0.2]]}
    told["kept_tokens"] = {"a": {"query": ["01", "10"]}}
    html = token_maps({"steps": [{"ms": 40}, {"ms": 60}], "method_data": {"asymrnr": told}})
    assert "step 2, a: 50% queries removed" in html and "step 2, a: 20% keys and values removed" in html
    assert "took 5 ms, 5.0% of the denoising" in html and "took 2 ms, 2.0% of the denoising" in html
    assert html.count("#3b82f6") == 1 + 4 and "1.30×" in html
    assert token_maps({"steps": [], "method_data": {}}) == ""


def test_timeline_shows_each_step_of_each_site():
    trace = Trace()
    for i in range(3):
        step = Step(i, 3, 1 - i / 3, 0.5, "cond")
        trace.sigmas[i] = step.sigma
        trace.record(step, "denoiser", "compute")
        trace.record(step, "blocks.0.attn1", "reuse" if i == 1 else "compute")
    svg = timeline(trace.to_json())
    assert (
        svg.count(f'fill="{ACTION_STYLE["reuse"][0]}"') == 1 and svg.count(f'fill="{ACTION_STYLE["compute"][0]}"') == 2
    )
    assert "step 2, σ 0.667, cond, blocks.0.attn1: attention reused" in svg


def test_timeline_shows_anchors_and_predicted_passes():
    trace = Trace()
    for i in range(4):
        step = Step(i, 4, 1 - i / 4, 0.5, "cond")
        trace.sigmas[i] = step.sigma
        for layer in ("denoiser", "blocks.0.attn1"):
            trace.record(step, layer, "compute")
        if i in (1, 2):
            trace.record(step, "denoiser", "predict", 0.2)
            trace.discard(step, ["blocks.0.attn1"])
    svg = timeline(trace.to_json())
    assert (
        svg.count(f'fill="{ACTION_STYLE["predict"][0]}"') == 2
        and svg.count(f'fill="{ACTION_STYLE["compute"][0]}"') == 2
    )
    assert "step 2, σ 0.750, cond, blocks.0.attn1: predicted" in svg


def test_the_code_that_is_shown_makes_the_same_video():
    defaults, methods = read_defaults(TINY), {"fastercache": {"attention_interval": 3, "extrapolation": "linear"}}
    run = build_run(defaults, model=TINY, prompt="a 'red' star spins", seed=3, steps=4, methods=methods)
    shown, names = snippet(run.model_dump()), {}
    assert "attention_interval=3" in shown and "weight" not in shown  # as it is by default
    exec(shown, names)
    same = generate(run, names["pipe"], defaults).frames
    np.testing.assert_array_equal((names["video"] * 255).round().astype(np.uint8), same)


def test_labels_of_the_player_are_escaped(tmp_path):
    for pane in "ab":
        (tmp_path / f"{pane}.mp4").write_bytes(b"")
    value = {"a": tmp_path / "a.mp4", "b": tmp_path / "b.mp4", "label_a": "<b>", "label_b": "x", "fps": 8, "frames": 1}
    assert ABPlayer().postprocess(value)["label_a"] == "&lt;b&gt;"


@pytest.fixture
def generated(monkeypatch):
    """Runs that were generated; each takes no time and gives gray frames."""
    runs = []

    def generate(run, pipe, defaults, on_step=None):
        runs.append(run)
        trace = Trace(started=0.0, sigmas={0: 1.0}, flops={"denoiser": 1})
        trace.record(Step(0, 1, 1.0, 0.0, "cond"), "denoiser", "compute")
        stages = {"text": 0.1, "denoise": 1.0, "decode": 0.1}
        return Video(np.full((5, 16, 16, 3), 128, np.uint8), torch.zeros(1, 4, 3, 2, 2), stages, trace)

    monkeypatch.setattr("ui.compare.generate", generate)
    monkeypatch.setattr("ui.compare.warm_up", lambda *args: None)
    return runs


def test_a_kept_baseline_is_not_generated_again_and_is_labelled_so(generated, worker, pipe):
    defaults = ModelDefaults(height=16, width=16, frames=5, steps=10)
    asked = {"prompt": "a red star", "seed": 1.0, "steps": 10.0, "guidance": 4.0, "methods": {"fastercache": {}}}
    shelf, pairs = VideoCache(), []
    for interval in (2, 3):
        other = {**asked, "methods": {"fastercache": {"attention_interval": interval}}}
        job = worker.submit(lambda job, *_, other=other: CompareJob("m", other, shelf)(job, pipe, defaults))
        pairs += [data for kind, data in worker.stream(job) if kind == "pair"]
    assert [bool(run.methods) for run in generated] == [False, True, True]
    assert "kept" not in pairs[0]["player"]["label_a"] and "kept, measured" in pairs[1]["player"]["label_a"]
    assert "measured earlier" in metric_cards(pairs[1]["report"]) and "measured earlier" not in metric_cards(
        pairs[0]["report"]
    )


def test_a_students_demands_are_not_the_baselines_and_the_third_pane_is_plain_in_as_few_steps(generated, worker, pipe):
    defaults = ModelDefaults(height=16, width=16, frames=5, steps=10)
    asked = {"prompt": "a red star", "seed": 1.0, "steps": 50.0, "guidance": 4.0, "methods": {"gpd": {"steps": 6}}}
    job = worker.submit(
        lambda job, *_: CompareJob("m", asked, VideoCache(), same_steps_baseline=True)(job, pipe, defaults)
    )
    told = dict(worker.stream(job))
    assert [(bool(r.methods), r.steps, r.guidance) for r in generated] == [(0, 50, 4), (1, 6, 1), (0, 6, 4)]
    assert told["rival"]["player"]["b"] == told["pair"]["player"]["b"]
    assert told["rival"]["player"]["label_a"].startswith("plain, 6 steps")
    assert "guidance is built in: 4 is the baseline" in told["pair"]["note"]


def test_a_pair_is_there_before_its_third_pane_is_generated(generated, worker, pipe):
    """The visitor stops as soon as the pair is told: nothing of it is lost, and the rest is not generated."""
    defaults = ModelDefaults(height=16, width=16, frames=5, steps=10)
    asked = {"prompt": "a red star", "seed": 1.0, "steps": 50.0, "guidance": 4.0, "methods": {"gpd": {"steps": 6}}}

    def work(job, *_):
        tell = job.emit
        job.emit = lambda kind, **data: (job.stop.set() if kind == "pair" else None, tell(kind, **data))
        CompareJob("m", asked, VideoCache(), same_steps_baseline=True)(job, pipe, defaults)

    assert kinds(worker, worker.submit(work)) == ["started", "pair", "stopped"] and len(generated) == 2


def test_the_page_offers_the_students_that_exist(pipe, students, tmp_path):
    (tmp_path / "gpd-N8" / "gpd.json").unlink()
    with gr.Blocks():
        made = controls.widgets(METHODS["gpd"](), METHODS["gpd"].available_values(tmp_path))
    assert [value for _, value in made["steps"].choices] == [0, 6, 12, 16, 24, 48]
    assert METHODS["gpd"].available_values(tmp_path / "none") == {"steps": []}


def test_a_slider_goes_as_far_as_the_student_learnt():
    assert METHODS["meanflow"].available_values(ROOT / TINY)["guidance"] == (2.0, 5.0)
    with gr.Blocks():
        made = controls.widgets(METHODS["meanflow"](), {"guidance": (2.0, 3.5)})
    assert (made["guidance"].minimum, made["guidance"].maximum, made["guidance"].value) == (2.0, 3.5, 3.5)


def test_a_third_pane_that_would_be_the_baseline_is_left_out_with_the_reason(generated, worker, pipe):
    asked = {"prompt": "a red star", "seed": 1.0, "steps": 10.0, "guidance": 4.0, "methods": {"fastercache": {}}}
    defaults = ModelDefaults(height=16, width=16, frames=5, steps=10)
    job = worker.submit(
        lambda job, *_: CompareJob("m", asked, VideoCache(), same_steps_baseline=True)(job, pipe, defaults)
    )
    told = dict(worker.stream(job))
    assert "rival" not in told and "No third pane: the plain model in as many steps" in told["pair"]["note"]


def test_a_preset_says_what_this_model_lacks_for_it(monkeypatch):
    monkeypatch.setattr("app.resolve", lambda model: Path("none"))
    monkeypatch.setattr("app.Worker", lambda model: None)
    page = app.Page("none")
    note = page.load("turbo")[0]
    assert f"{METHODS['meanflow'].title}, which is off" in note and "predictor residual, reuse is set instead" in note
    assert page.load("fastercache")[0] == ""


def test_a_knob_falls_back_on_the_nearest_value_that_there_is():
    assert (
        controls.nearest_available(7, [0, 6, 48]) == 6
        and controls.nearest_available("residual", ["reuse", "taylor-1"]) == "reuse"
    )
    assert controls.nearest_available(9.0, (2.0, 5.0)) == 5.0 and controls.nearest_available(3, None) == 3


def test_old_videos_leave_the_disk(generated, tmp_path, monkeypatch):
    monkeypatch.setattr("ui.compare.KEPT", 2)
    shelf, defaults = VideoCache(), ModelDefaults(height=16, width=16, frames=5)
    for seed in range(4):
        run = build_run(defaults, model="m", prompt="p", seed=seed, methods={"fastercache": {}})
        shelf.keep_a_while(shelf.write(generate_gray(run), run, 8))
    assert len(list(shelf.folder.iterdir())) == 2


def generate_gray(run):
    from ui import compare as pair

    return pair.generate(run, None, None)
