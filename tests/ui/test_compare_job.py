"""The job behind Run, with a `generate` that takes no time, and what the page makes of its result."""

import gradio as gr
import numpy as np
import pytest
import torch

from accel.core.trace import Step, Trace
from accel.runtime.generate import Video, generate
from accel.runtime.models import TINY, ModelDefaults, read_defaults
from accel.runtime.run import build_run
from ui.compare_job import CompareJob
from ui.panels import metric_cards, note
from ui.recorded import recorded_pairs
from ui.results import Results
from ui.snippet import snippet
from ui.video_cache import VideoCache

DEFAULTS = ModelDefaults(height=16, width=16, frames=5, steps=10)
SETTINGS = {"prompt": "a red star", "seed": 1.0, "steps": 10.0, "guidance": 4.0, "methods": {"fastercache": {}}}
GPD_SETTINGS = {**SETTINGS, "steps": 50.0, "methods": {"gpd": {"steps": 6}}}


def gray_video() -> Video:
    trace = Trace(started=0.0, sigmas={0: 1.0}, flops={"denoiser": 1})
    trace.record(Step(0, 1, 1.0, 0.0, "cond"), "denoiser", "compute")
    stages = {"text": 0.1, "denoise": 1.0, "decode": 0.1}
    return Video(np.full((5, 16, 16, 3), 128, np.uint8), torch.zeros(1, 4, 3, 2, 2), stages, trace)


@pytest.fixture
def generated(monkeypatch) -> list:
    """The runs that were generated; each takes no time and gives a gray video."""
    runs = []

    def instantly(run, pipe, defaults, on_step=None):
        runs.append(run)
        return gray_video()

    for module in ("ui.compare_job", "accel.evaluation.compare"):
        monkeypatch.setattr(f"{module}.generate", instantly)
    monkeypatch.setattr("accel.evaluation.compare.warm_up", lambda *args: None)
    return runs


@pytest.fixture
def events(workers, pipe):
    """events(job): the events of a CompareJob as a list of (kind, data)."""

    def run(compare_job) -> list[tuple[str, dict]]:
        job = workers.submit(lambda job, *_: compare_job(job, pipe, DEFAULTS))
        return [(kind, data) for kind, data in workers.stream(job) if kind != "waiting"]

    return run


def test_a_cached_baseline_is_not_generated_again_and_is_labelled_as_cached(generated, events):
    videos, pairs = VideoCache(), []
    for interval in (2, 3):
        settings = {**SETTINGS, "methods": {"fastercache": {"attention_interval": interval}}}
        pairs.append(dict(events(CompareJob("m", settings, videos)))["pair"])
    assert [bool(run.methods) for run in generated] == [False, True, True]
    assert "cached" not in pairs[0]["player"]["label_a"] and "cached, measured" in pairs[1]["player"]["label_a"]
    assert pairs[0]["player"]["a"] == pairs[1]["player"]["a"]
    earlier = ["measured earlier" in metric_cards(pair["report"]) for pair in pairs]
    assert earlier == [False, True]


def test_a_student_does_not_change_the_baseline_and_the_third_video_has_the_students_step_count(generated, events):
    data = dict(events(CompareJob("m", GPD_SETTINGS, VideoCache(), same_steps_baseline=True)))
    assert [(bool(r.methods), r.steps, r.guidance) for r in generated] == [(0, 50, 4), (1, 6, 1), (0, 6, 4)]
    third = data["same_steps_baseline"]["player"]
    assert third["b"] == data["pair"]["player"]["b"] and third["label_a"].startswith("baseline, 6 steps")
    assert "guidance is built in: guidance 4 applies to the baseline" in data["pair"]["message"]


def test_stop_after_the_pair_loses_nothing_and_generates_no_third_video(generated, workers, pipe):
    def work(job, *_):
        emit = job.emit
        job.emit = lambda kind, **data: (job.stop.set() if kind == "pair" else None, emit(kind, **data))
        CompareJob("m", GPD_SETTINGS, VideoCache(), same_steps_baseline=True)(job, pipe, DEFAULTS)

    kinds = [kind for kind, _ in workers.stream(workers.submit(work)) if kind != "waiting"]
    assert kinds == ["started", "pair", "stopped"] and len(generated) == 2


def test_a_third_video_that_would_equal_the_baseline_is_left_out_with_the_reason(generated, events):
    data = dict(events(CompareJob("m", SETTINGS, VideoCache(), same_steps_baseline=True)))
    assert "same_steps_baseline" not in data
    assert "There is no third video: the baseline already has" in data["pair"]["message"]


def test_a_seed_with_a_fraction_is_refused(generated, events):
    kind, data = events(CompareJob("m", {**SETTINGS, "seed": 1.5}, VideoCache()))[-1]
    assert kind == "refused" and data["reason"] == "seed = 1.5 is not a whole number" and not generated


def test_each_event_changes_its_components_and_keeps_the_others(generated, events):
    with gr.Blocks():
        results = Results()
    for kind, data in events(CompareJob("m", GPD_SETTINGS, VideoCache(), same_steps_baseline=True)):
        update = results.update(kind, data)
        assert set(update) <= set(results.components)
        if kind == "started":
            assert set(update) == {results.message, *results.panes.values()}
        elif kind == "pair":
            assert set(update) == set(results.components)
        elif kind == "same_steps_baseline":
            assert set(update) == {results.same_steps_player, *results.panes.values()}
    assert set(results.update("stopped", {})) == {results.message, *results.panes.values()}
    assert results.update("done", {}) == {}


def test_text_from_users_is_escaped():
    assert "&lt;b&gt;" in note("<b>") and "<b>" not in note("<b>")
    report = recorded_pairs()[0].report
    assert "&lt;i&gt;" in metric_cards({**report, "device": "<i>"})


def test_the_code_that_is_shown_makes_the_same_video():
    defaults, methods = read_defaults(TINY), {"fastercache": {"attention_interval": 3, "extrapolation": "linear"}}
    run = build_run(defaults, model=TINY, prompt="a 'red' star spins", seed=3, steps=4, methods=methods)
    code, names = snippet(run.model_dump()), {}
    assert "attention_interval=3" in code and "extrapolation" not in code  # a default is left out
    exec(code, names)
    same = generate(run, names["pipe"], defaults).frames
    np.testing.assert_array_equal((names["video"] * 255).round().astype(np.uint8), same)


def test_the_oldest_videos_are_deleted_from_disk(monkeypatch):
    monkeypatch.setattr("ui.video_cache.MAX_VIDEOS", 2)
    videos = VideoCache()
    for seed in range(4):
        baseline = build_run(DEFAULTS, model="m", prompt="p", seed=seed)
        accelerated = build_run(DEFAULTS, model="m", prompt="p", seed=seed, methods={"fastercache": {}})
        videos.add_baseline(baseline, gray_video(), 8)
        videos.add_accelerated(accelerated, gray_video(), 8)
        videos.baseline(build_run(DEFAULTS, model="m", prompt="p", seed=0))  # used, so not the first to go
    assert len(list(videos.folder.iterdir())) == 4
    seeds = [s for s in range(4) if videos.baseline(build_run(DEFAULTS, model="m", prompt="p", seed=s))]
    assert seeds == [0, 3]
