"""The workers: whose turn it is, Stop, full queues, visitors who leave, models that change, and errors."""

import errno
import re
import threading

import pytest

from accel.errors import AccelError
from ui.panels import unexpected
from ui.worker import MAX_WAITING, MAX_WAITING_PER_VISITOR, FairQueue, Job, Workers


def kinds(workers, job) -> list[str]:
    return [kind for kind, _ in workers.stream(job) if kind != "waiting"]


def endless(job, pipe, defaults):
    while True:
        job.emit("step")


@pytest.fixture
def busy(workers):
    """A worker that is running a job until `busy.end()`, and that job's visitor, "first"."""
    began, gate = threading.Event(), threading.Event()
    workers.first = workers.submit(lambda *_: (began.set(), gate.wait(20)), "first")
    assert began.wait(20)
    workers.end = gate.set
    yield workers
    gate.set()


def queue_of(*visitors: str) -> FairQueue:
    waiting = FairQueue()
    for i, visitor in enumerate(visitors):
        waiting.put(Job(None, visitor, "none", id=f"{visitor}{i}"))
    return waiting


def test_visitors_take_turns_and_the_jobs_of_each_keep_their_order():
    waiting = queue_of("a", "a", "a", "b", "b", "c")
    assert [waiting.take().id for _ in range(6)] == ["a0", "b3", "c5", "a1", "b4", "a2"]


def test_the_order_in_the_queue_is_the_order_in_which_jobs_are_taken():
    waiting = queue_of("a", "a", "b", "a", "c")
    assert [job.id for job in waiting.all()] == ["a0", "b2", "c4", "a1", "a3"]
    waiting.discard(waiting.of("a")[0])
    order = waiting.all()
    assert [waiting.take() for _ in range(4)] == order


def test_a_waiting_job_reports_how_many_are_ahead_of_it(busy):
    assert next(busy.stream(busy.submit(lambda *_: None, "second"))) == (
        "waiting", {"ahead": 1, "loading": False, "seconds": None},
    )  # fmt: skip


def test_jobs_run_one_after_the_other(workers):
    order = []
    jobs = [workers.submit(lambda job, *_, i=i: order.append(i), str(i)) for i in range(3)]
    assert [kinds(workers, job) for job in jobs] == [["done"]] * 3 and order == [0, 1, 2]


def test_two_devices_run_two_jobs_at_once(load_model):
    load_model(lambda model: None)
    workers, meet = Workers("none", ("one", "two")), threading.Barrier(2, timeout=20)
    workers.start()
    jobs = [workers.submit(lambda *_: meet.wait(), visitor) for visitor in "ab"]
    assert [kinds(workers, job) for job in jobs] == [["done"]] * 2


def test_stop_ends_a_job_at_its_next_event_and_the_next_job_runs(workers):
    job = workers.submit(endless, "me")
    stream = workers.stream(job)
    assert next(event for event in stream if event[0] != "waiting")[0] == "step"
    assert workers.stop("me") == 1
    assert [kind for kind, _ in stream][-1] == "stopped"
    assert kinds(workers, workers.submit(lambda *_: None)) == ["done"]


def test_stop_reaches_every_job_of_its_visitor_and_no_other(busy):
    mine = [busy.submit(lambda *_: None, "me") for _ in range(2)]
    other = busy.submit(lambda *_: None, "other")
    assert busy.stop("me") == 2 and busy.stop("me") == 0
    assert [kinds(busy, job) for job in mine] == [["stopped"]] * 2
    busy.end()
    assert kinds(busy, other) == ["done"] and kinds(busy, busy.first) == ["done"]


def test_one_job_can_be_stopped_by_its_id(busy):
    first, second = (busy.submit(lambda *_: None, "me") for _ in range(2))
    assert busy.stop("me", second.id) == 1
    busy.end()
    assert kinds(busy, first) == ["done"] and kinds(busy, second) == ["stopped"]


def test_stopped_waiting_jobs_free_their_places_at_once(busy):
    visitors = [f"visitor {i}" for i in range(MAX_WAITING)]
    for visitor in visitors:
        busy.submit(lambda *_: None, visitor)
    assert kinds(busy, busy.submit(lambda *_: None, "late")) == ["refused"]
    for visitor in visitors:
        busy.stop(visitor)
    job = busy.submit(lambda *_: None, "late")
    assert next(busy.stream(job))[1]["ahead"] == 1


def test_a_visitor_can_have_only_so_many_waiting_jobs(busy):
    jobs = [busy.submit(lambda *_: None, "me") for _ in range(MAX_WAITING_PER_VISITOR + 1)]
    reason = f"{MAX_WAITING_PER_VISITOR} of your runs are waiting already: stop one or wait"
    assert list(busy.stream(jobs[-1])) == [("refused", {"reason": reason})]


def test_a_slow_step_reports_that_it_is_stopping_before_it_has_stopped(workers):
    began, gate = threading.Event(), threading.Event()
    job = workers.submit(lambda job, *_: (began.set(), gate.wait(20), job.emit("step")), "me")
    assert began.wait(20)
    workers.stop("me")
    stream = workers.stream(job)
    assert next(stream)[0] == "stopping"
    gate.set()
    assert [kind for kind, _ in stream][-1] == "stopped"


def test_stop_while_the_model_is_loading_ends_the_job_at_once(load_model):
    gate, ran = threading.Event(), []
    load_model(lambda model: gate.wait(20) and None)
    workers = Workers("none")
    workers.start()
    job = workers.submit(lambda *_: ran.append(1), "me")
    stream = workers.stream(job)
    assert next(stream) == ("waiting", {"ahead": 0, "loading": True, "seconds": None})
    workers.stop("me")
    assert [kind for kind, _ in stream] == ["stopped"] and not gate.is_set()
    gate.set()
    assert kinds(workers, workers.submit(lambda *_: None)) == ["done"] and not ran


def test_a_job_submitted_before_the_workers_start_waits_and_then_runs(load_model):
    load_model(lambda model: None)
    workers = Workers("none")
    stream = workers.stream(workers.submit(lambda job, *_: job.emit("hello")))
    assert next(stream) == ("waiting", {"ahead": 0, "loading": True, "seconds": None})
    workers.start()
    assert [kind for kind, _ in stream if kind != "waiting"] == ["hello", "done"]


def test_the_log_has_what_a_model_that_cannot_be_loaded_failed_with(load_model, caplog):
    def load(model):
        try:
            raise OSError("disk gone")
        except OSError as error:
            raise AccelError("it could not be loaded") from error

    load_model(load)
    workers = Workers("none")
    workers.start()
    assert kinds(workers, workers.submit(lambda *_: None)) == ["refused"]
    assert "disk gone" in caplog.text


def test_a_visitor_who_leaves_stops_the_job(workers):
    job = workers.submit(endless)
    stream = workers.stream(job)
    next(stream)
    stream.close()
    assert job.stop.is_set()
    assert kinds(workers, workers.submit(lambda *_: None)) == ["done"]


def test_a_job_gets_the_model_that_it_names_and_the_other_one_is_freed_first(load_model):
    held = []

    def load(model):
        held.append((model, dict(workers.loaded)))

    load_model(load)
    workers = Workers("first", models={"second": ""})
    workers.start()
    for model in ("second", "second", "first"):
        assert kinds(workers, workers.submit(lambda *_: None, "me", model)) == ["done"]
    assert held == [("first", {}), ("second", {}), ("first", {})]
    assert workers.pipeline("first") and workers.pipeline("second") is None


def test_a_small_model_stays_beside_a_large_one(load_model, monkeypatch):
    asked = []
    load_model(asked.append)
    monkeypatch.setattr("ui.zero_gpu.is_small", lambda model: model == "small")
    workers = Workers("large", models={"small": "", "other": ""})
    workers.start()
    for model in ("small", "large", "other", "small"):
        assert kinds(workers, workers.submit(lambda *_: None, "me", model)) == ["done"]
    assert asked == ["large", "small", "other"] and workers.pipeline("large") is None


def test_a_model_that_is_not_offered_or_cannot_run_here_is_refused_and_never_loaded(load_model):
    asked = []
    load_model(asked.append)
    workers = Workers("first", models={"second": "", "huge": "huge needs a GPU"})
    workers.start()
    reasons = {"/etc": "the model '/etc' is not offered here; there are first, second", "huge": "huge needs a GPU"}
    for model, reason in reasons.items():
        assert list(workers.stream(workers.submit(lambda *_: None, "me", model))) == [("refused", {"reason": reason})]
    assert kinds(workers, workers.submit(lambda *_: None)) == ["done"] and asked == ["first"]


def test_a_job_goes_to_the_idle_device_that_has_its_model(load_model):
    asked, devices = [], []
    load_model(asked.append)
    workers, began, gate = (
        Workers("first", ("one", "two"), {"second": ""}),
        threading.Barrier(3, timeout=20),
        threading.Event(),
    )
    workers.start()
    hold = lambda *_: (began.wait(), gate.wait(20))
    held = [workers.submit(hold, "a", "first"), workers.submit(hold, "b", "second")]
    began.wait()
    gate.set()
    assert [kinds(workers, job) for job in held] == [["done"]] * 2
    asked.clear()
    note = lambda *_: devices.append(threading.current_thread().name)
    for model in ("second", "second", "first", "second"):
        assert kinds(workers, workers.submit(note, "me", model)) == ["done"]
    assert asked == [] and devices[0] == devices[1] == devices[3] != devices[2]


def test_stop_while_another_model_is_loading_ends_the_job_at_once(load_model):
    loading, gate, ran = threading.Event(), threading.Event(), []
    load_model(lambda model: (loading.set(), gate.wait(20), None)[-1] if model == "second" else None)
    workers = Workers("first", models={"second": ""})
    workers.start()
    job = workers.submit(lambda *_: ran.append(1), "me", "second")
    assert loading.wait(20)
    stream = workers.stream(job)
    assert next(stream) == ("waiting", {"ahead": 0, "loading": True, "seconds": None})
    assert workers.stop("me") == 1 and [kind for kind, _ in stream] == ["stopped"] and not gate.is_set()
    gate.set()
    assert kinds(workers, workers.submit(lambda *_: None)) == ["done"] and not ran


def test_the_waiting_time_is_estimated_from_earlier_jobs(busy, monkeypatch):
    monkeypatch.setattr("ui.worker.time.monotonic", lambda: 100.0)
    busy._durations.append(10.0)
    busy._running[None] = (busy.first, 96.0)  # 6 s are left of it
    streams = [busy.stream(busy.submit(lambda *_: None, visitor)) for visitor in "ab"]
    assert [next(stream)[1]["seconds"] for stream in streams] == [6.0, 16.0]


def test_closed_workers_stop_all_jobs_and_take_no_more(workers):
    jobs = [workers.submit(endless, visitor) for visitor in "ab"]
    stream = workers.stream(jobs[0])
    assert next(event for event in stream if event[0] != "waiting")[0] == "step"
    workers.close(timeout=20)
    assert [kind for kind, _ in stream][-1] == "stopped" and kinds(workers, jobs[1]) == ["stopped"]
    assert kinds(workers, workers.submit(lambda *_: None)) == ["refused"]


def test_refused_input_is_reported_in_full_and_an_unexpected_error_by_its_id(workers, caplog):
    def refuse(job, pipe, defaults):
        raise AccelError("the prompt is empty")

    def fail(job, pipe, defaults):
        raise KeyError("secret path")

    assert list(workers.stream(workers.submit(refuse)))[-1] == ("refused", {"reason": "the prompt is empty"})
    kind, data = list(workers.stream(workers.submit(fail)))[-1]
    error_id = data["reason"].removeprefix(unexpected("").removesuffix(".")).removesuffix(".")
    assert kind == "failed" and re.fullmatch("[0-9a-f]{8}", error_id) and error_id in caplog.text


@pytest.mark.parametrize("error, final, sentence", [
    (MemoryError(), "failed", "not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "failed", "not enough memory"),
    (OSError(errno.ENOSPC, "No space left", "/secret/path"), "refused", "the disk is full"),
])  # fmt: skip
def test_a_full_memory_or_disk_is_explained_and_the_next_job_runs(workers, error, final, sentence):
    def fail(*_):
        raise error

    kind, data = list(workers.stream(workers.submit(fail)))[-1]
    assert kind == final and sentence in data["reason"] and "/secret" not in data["reason"]
    assert kinds(workers, workers.submit(lambda *_: None)) == ["done"]


def test_every_visitor_reads_why_a_model_cannot_be_loaded(load_model):
    def missing(model):
        raise AccelError("no model folder 'none'")

    load_model(missing)
    workers = Workers("none")
    assert workers.is_loading("none")  # from the start on
    workers.start()
    for _ in range(2):
        job = workers.submit(lambda *_: None)
        assert list(workers.stream(job))[-1] == ("refused", {"reason": "no model folder 'none'"})
    assert not workers.is_loading("none")
