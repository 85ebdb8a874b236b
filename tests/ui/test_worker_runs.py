"""Real runs of the shipped model on the workers: nothing of one run is left in the next, whatever became of it."""

import errno
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest

from accel.errors import AccelError
from accel.runtime.generate import generate
from accel.runtime.models import TINY, load_pipeline, read_defaults
from accel.runtime.presets import load_preset
from accel.runtime.run import Cancelled, build_run
from ui.worker import Workers

DEFAULTS = read_defaults(TINY)
METHODS = {name: load_preset(name).methods for name in ("fastercache", "asymrnr", "combined")}


def run_of(i: int):
    """The i-th of several runs of two steps that differ in prompt, seed, size, guidance and methods."""
    methods = [{}, *METHODS.values()][i % 4]
    size = {"height": 32, "frames": 5 + 4 * (i % 2)}
    prompt = f"a large {['red', 'blue', 'green'][i % 3]} star"
    return build_run(DEFAULTS, model=TINY, prompt=prompt, seed=i, steps=2, guidance=1 + i % 5, methods=methods, **size)


@pytest.fixture(scope="module")
def workers():
    workers = Workers(TINY)
    workers.start()
    yield workers
    workers.close()


def frames_on(workers, run, visitor: str = "me") -> np.ndarray:
    """The frames of a run, as a visitor gets them who follows its events."""
    found = []
    work = lambda job, pipe, defaults: found.append(generate(run, pipe, defaults, lambda *_: job.emit("step")).frames)
    kinds = [kind for kind, _ in workers.stream(workers.submit(work, visitor))]
    assert kinds[-1] == "done", kinds
    return found[0]


@pytest.fixture(scope="module")
def alone(tiny_wan):
    """alone(run): the frames of a run on a pipeline that has done nothing else."""
    return lambda run: generate(run, deepcopy(tiny_wan), DEFAULTS).frames


@pytest.mark.slow
def test_ten_visitors_at_once_get_the_frames_that_each_would_have_got_alone(workers, alone):
    runs = [run_of(i) for i in range(10)]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda i: frames_on(workers, runs[i], f"visitor {i}"), range(10)))
    assert all(np.array_equal(frames, alone(run)) for run, frames in zip(runs, together))


ERRORS = {
    "stopped": Cancelled(), "refused": AccelError("no"), "bug": KeyError("x"), "memory": MemoryError(),
    "tensor memory": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
}  # fmt: skip


@pytest.mark.slow
def test_the_run_after_any_error_in_mid_run_is_that_of_a_fresh_process(workers, alone):
    run = build_run(DEFAULTS, model=TINY, prompt="a red star", seed=3, steps=3, methods=METHODS["combined"])
    expected = alone(run)
    for error in ERRORS.values():

        def work(job, pipe, defaults, error=error):
            def fail(done, *_):
                if done == 2:
                    raise error

            generate(run, pipe, defaults, fail)

        kinds = [kind for kind, _ in workers.stream(workers.submit(work))]
        assert kinds[-1] in ("stopped", "refused", "failed")
        assert np.array_equal(frames_on(workers, run), expected)


@pytest.mark.slow
def test_a_run_after_another_model_was_loaded_is_the_same(workers, tmp_path):
    copy = tmp_path / "copy"
    load_pipeline(TINY).save_pretrained(copy)
    (copy / "accel.json").write_text(DEFAULTS.model_dump_json())
    two = Workers(TINY, models={str(copy): ""})
    two.start()
    run = run_of(1)
    first = frames_on(two, run)
    for model in (str(copy), TINY):
        assert [kind for kind, _ in two.stream(two.submit(lambda *_: None, "me", model))][-1] == "done"
    assert np.array_equal(frames_on(two, run), first)
    two.close()


def test_a_step_is_measured_when_a_model_is_loaded(workers):
    run = build_run(DEFAULTS, model=TINY, prompt="a red star")
    frames_on(workers, run_of(0))
    assert workers.step_seconds(run) > 0
    assert workers.step_seconds(run.model_copy(update={"height": 32})) is None
