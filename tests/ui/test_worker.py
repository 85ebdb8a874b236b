"""The worker: one job at a time, Stop, a full queue, visitors who leave, and errors."""

import threading
from types import SimpleNamespace

from accel.errors import AccelError
from ui.worker import Worker


def kinds(worker, job) -> list[str]:
    return [kind for kind, _ in worker.stream(job) if kind != "waiting"]


def endless(job, pipe, defaults):
    while True:
        job.emit("step")


def test_jobs_run_one_after_the_other_and_a_waiting_job_reports_its_position(worker):
    gate = threading.Event()
    first = worker.submit(lambda job, pipe, defaults: gate.wait(5))
    second = worker.submit(lambda job, pipe, defaults: job.emit("hello"))
    kind, data = next(worker.stream(second))
    assert kind == "waiting" and data["ahead"] == 1
    gate.set()
    third = worker.submit(lambda job, pipe, defaults: job.emit("hello"))
    assert kinds(worker, first) == ["done"] and kinds(worker, third) == ["hello", "done"]


def test_stop_ends_a_job_at_its_next_event_and_the_next_job_runs(worker):
    job = worker.submit(endless)
    stream = worker.stream(job)
    assert next(stream)[0] == "step"
    job.stop.set()
    assert [kind for kind, _ in stream][-1] == "stopped"
    assert kinds(worker, worker.submit(lambda *_: None)) == ["done"]


def test_a_slow_step_reports_that_it_is_stopping_before_it_has_stopped(worker):
    began, gate = threading.Event(), threading.Event()
    job = worker.submit(lambda job, *_: (began.set(), gate.wait(5), job.emit("step")))
    assert began.wait(5)
    job.stop.set()
    stream = worker.stream(job)
    assert next(stream)[0] == "stopping"
    gate.set()
    assert [kind for kind, _ in stream][-1] == "stopped"


def test_stop_while_the_model_is_loading_ends_the_job_at_once(load_model):
    gate, ran = threading.Event(), []
    load_model(lambda model: gate.wait(5))
    worker = Worker("none")
    worker.start()
    job = worker.submit(lambda *_: ran.append(1))
    stream = worker.stream(job)
    assert next(stream) == ("waiting", {"ahead": 0, "loading": True})
    job.stop.set()
    assert [kind for kind, _ in stream] == ["stopped"] and not gate.is_set()
    gate.set()
    assert kinds(worker, worker.submit(lambda *_: None)) == ["done"] and not ran


def test_a_job_submitted_before_the_worker_starts_waits_and_then_runs(load_model):
    load_model(lambda model: SimpleNamespace())
    worker = Worker("none")
    stream = worker.stream(worker.submit(lambda job, *_: job.emit("hello")))
    assert next(stream) == ("waiting", {"ahead": 0, "loading": True})
    worker.start()
    assert [kind for kind, _ in stream if kind != "waiting"] == ["hello", "done"]


def test_a_full_queue_refuses_new_jobs_and_serves_the_queued_ones(worker, monkeypatch):
    monkeypatch.setattr("ui.worker.MAX_QUEUE", 1)
    began, gate = threading.Event(), threading.Event()
    first = worker.submit(lambda *_: (began.set(), gate.wait(5)))
    assert began.wait(5)
    second, third = (worker.submit(lambda *_: None) for _ in range(2))
    assert list(worker.stream(third)) == [("refused", {"reason": "1 runs are waiting already: try again later"})]
    gate.set()
    assert kinds(worker, first) == kinds(worker, second) == ["done"]


def test_a_visitor_who_leaves_stops_the_job(worker):
    job = worker.submit(endless)
    stream = worker.stream(job)
    next(stream)
    stream.close()
    assert job.stop.is_set()
    assert kinds(worker, worker.submit(lambda *_: None)) == ["done"]


def test_refused_input_is_reported_in_full_and_an_unexpected_error_by_its_id(worker, caplog):
    def refuse(job, pipe, defaults):
        raise AccelError("the prompt is empty")

    def fail(job, pipe, defaults):
        raise KeyError("secret path")

    assert list(worker.stream(worker.submit(refuse)))[-1] == ("refused", {"reason": "the prompt is empty"})
    kind, data = list(worker.stream(worker.submit(fail)))[-1]
    assert kind == "failed" and "secret" not in str(data) and data["error_id"] in caplog.text


def test_every_visitor_reads_why_a_model_cannot_be_loaded(load_model):
    def missing(model):
        raise AccelError("no model folder 'none'")

    load_model(missing)
    worker = Worker("none")
    worker.start()
    for _ in range(2):
        job = worker.submit(lambda *_: None)
        assert list(worker.stream(job))[-1] == ("refused", {"reason": "no model folder 'none'"})
