"""The job behind Run, on a small random model: what it generates, keeps, stores, reports and refuses."""

import numpy as np
import pytest
import torch

from accel.core.trace import Step, Trace
from accel.errors import AccelError
from accel.runtime.generate import Video
from accel.runtime.models import ModelDefaults
from accel.runtime.preview import Race
from ui.compare_job import CompareJob, build_side, make_pair
from ui.context import Context
from ui.side_settings import describe_side, side_of
from ui.store import Store
from ui.worker import Workers

DEFAULTS = ModelDefaults(height=16, width=16, frames=5, steps=10, fps=8)
RUN = {"model": "none", "prompt": "a red star", "seed": 1}
PLAIN = {"steps": 10, "guidance": 4.0, "solver": "default", "shift": None, "methods": {}}
FASTER = {**PLAIN, "methods": {"fastercache": {}}}


def gray_video() -> Video:
    trace = Trace(started=0.0, sigmas={0: 1.0}, flops={"denoiser": 1})
    trace.record(Step(0, 1, 1.0, 0.0, "cond"), "denoiser", "compute")
    stages = {"text": 0.1, "denoise": 1.0, "decode": 0.1}
    race = Race(b"jpeg", [10], [1.0], 1.0, 1, 16, 16)
    return Video(np.full((5, 16, 16, 3), 128, np.uint8), torch.zeros(1, 4, 3, 2, 2), stages, trace, race)


@pytest.fixture
def generated(monkeypatch) -> list:
    """The runs that were generated; each takes no time and gives a gray video."""
    runs = []

    def instantly(run, pipe, defaults, on_step=None):
        runs.append(run)
        return gray_video()

    monkeypatch.setattr("accel.evaluation.compare.generate", instantly)
    monkeypatch.setattr("accel.evaluation.compare.warm_up", lambda *args: None)
    monkeypatch.setattr("accel.evaluation.compare.RaceRecorder.finish", lambda *args: gray_video().race)
    return runs


@pytest.fixture
def context(tmp_path):
    return Context("none", Workers("none"), Store(tmp_path))


@pytest.fixture
def events(workers, pipe, context):
    """events(reference, candidate): the events of a CompareJob as a list of (kind, data)."""

    def run(reference: dict, candidate: dict, **run) -> list[tuple[str, dict]]:
        work = CompareJob(context, "me", {**RUN, **run}, reference, candidate)
        job = workers.submit(lambda job, *_: work(job, pipe, DEFAULTS))
        return [(kind, data) for kind, data in workers.stream(job) if kind != "waiting"]

    return run


def test_a_pair_is_stored_for_its_visitor_with_both_videos_and_their_previews(generated, events, context):
    kinds = dict(events(PLAIN, FASTER))
    stored = context.store.find(kinds["pair"]["run_id"])
    assert [run.methods for run in generated] == [{}, {"fastercache": {}}]
    assert stored.visitor == "me" and context.store.list("me")[0].id == stored.id
    assert {file.name for file in stored.folder.iterdir()} == {"a.mp4", "b.mp4", "a.jpg", "b.jpg", "run.json"}
    assert stored.report["reference"]["steps"] == 10 and stored.report["methods"] == {"fastercache": {}}
    assert not list(context.store.folder.glob("part-*"))


def test_a_reference_that_is_kept_is_not_generated_again_and_the_report_says_when_it_was(generated, events, context):
    events(PLAIN, FASTER)
    assert len(generated) == 2
    kinds = dict(events(PLAIN, {**FASTER, "steps": 8}))
    assert kinds["started"]["cached"] and len(generated) == 3
    report = context.store.find(kinds["pair"]["run_id"]).report
    assert report["baseline_measured_at"] and report["steps"] == 8
    assert dict(events(PLAIN, FASTER, seed=2))["started"]["cached"] is False


def test_the_reference_may_have_methods_and_the_candidate_none(generated, events):
    assert events(FASTER, {**PLAIN, "steps": 5})[-1][0] == "done"
    assert [(run.steps, run.methods) for run in generated] == [(10, {"fastercache": {}}), (5, {})]


def test_only_plain_references_tell_how_long_a_step_takes(generated, events, context):
    events(FASTER, PLAIN)
    assert context.workers.step_seconds(generated[0]) is None
    events(PLAIN, FASTER)
    assert context.workers.step_seconds(generated[0]) == pytest.approx(0.1)


def test_the_work_of_a_candidate_is_known_for_the_same_settings_with_another_prompt(generated, events, context):
    events(PLAIN, FASTER)
    *_, candidate = generated
    share = context.store.list("me")[-1].report["trace"]["summary"]["flops_ratio"]
    assert context.workers.work(candidate.model_copy(update={"prompt": "a blue ring", "seed": 9})) == share
    assert context.workers.work(candidate.model_copy(update={"steps": 9})) is None


def test_a_pair_without_a_visitor_who_waits_is_made_the_same_way(generated, workers, pipe, context):
    a, b = (build_side(DEFAULTS, RUN, side) for side in (PLAIN, FASTER))
    job = workers.submit(lambda job, *_: make_pair(job, context, "me", a, b, pipe, DEFAULTS, group="sweep"))
    assert [kind for kind, _ in workers.stream(job)][-1] == "done"
    assert [stored.group for stored in context.store.list("me")] == ["sweep"]


@pytest.mark.parametrize("wrong, sentence", [
    ({"prompt": "  "}, "the prompt is empty"), ({"seed": 1.5}, "seed = 1.5"), ({"seed": -1}, "seed = -1"),
    ({"seed": None}, "seed is empty"),
])  # fmt: skip
def test_refused_input_is_explained_and_nothing_is_stored(generated, events, context, wrong, sentence):
    kind, data = events(PLAIN, FASTER, **wrong)[-1]
    assert kind == "refused" and sentence in data["reason"]
    assert not generated and not context.store.list("me")


def test_an_emptied_number_is_refused_and_a_missing_one_is_the_models_own():
    assert build_side(DEFAULTS, RUN, {"methods": {}}).steps == 10
    with pytest.raises(AccelError, match="steps is empty"):
        build_side(DEFAULTS, RUN, {**PLAIN, "steps": None})


def test_a_students_own_steps_and_guidance_replace_those_of_the_widgets():
    run = build_side(DEFAULTS, RUN, {**PLAIN, "methods": {"gpd": {"steps": 6}}})
    assert (run.steps, run.guidance) == (6, 1.0)


def test_words_that_a_closed_vocabulary_lacks_are_named(generated, events, pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.tokenizer), "get_vocab", lambda self: {"a": 0, "red": 1})
    message = dict(events(PLAIN, FASTER, prompt="a red dragon"))["started"]["message"]
    assert "The model does not know: dragon. It ignores unknown words." in message


def test_a_side_is_described_by_what_is_not_the_models_own():
    assert describe_side(PLAIN) == "plain, 10 steps"
    assert describe_side({**FASTER, "solver": "euler", "shift": 5.0}) == "fastercache, 10 steps, euler, shift 5"
    assert side_of({**PLAIN, "seed": 1}) == PLAIN
