"""The training loop on the smallest task: resuming, stopping, EMA weights."""

import json
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from accel.errors import AccelError
from accel.training.loop import fit
from accel.training.optimizer import OptimConfig


class Line:
    """The smallest task: fits y = 2 x with one weight and a bias."""

    def __init__(self, steps: int = 30):
        torch.manual_seed(1)
        self.optim, self.module = OptimConfig(steps=steps, lr=0.1, warmup=3), nn.Linear(1, 1)

    def matrices(self):
        return [self.module.weight]

    def loss(self, model, step, seed):
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(seed))
        return (model(x).float() - 2 * x).square().mean(), {}

    def sample_grid(self, path):
        path.write_text(f"{self.module.weight.item()}")


def test_resumed_training_equals_uninterrupted(tmp_path):
    unbroken = Line()
    fit(unbroken, tmp_path / "unbroken", minutes=None, resume=False)
    first = Line()
    original, calls = first.loss, []

    def interrupted(model, step, seed):
        calls.append(step)
        if len(calls) == 11:
            signal.raise_signal(signal.SIGINT)
        return original(model, step, seed)

    first.loss = interrupted
    assert fit(first, tmp_path / "part", minutes=None, resume=False)["step"] == 11
    again = Line()
    assert fit(again, tmp_path / "part", minutes=None, resume=True)["step"] == 30
    assert torch.equal(again.module.weight, unbroken.module.weight)


def test_a_run_is_checked_with_its_ema_weights_and_ends_with_them(tmp_path):
    line, seen = Line(), []
    check = lambda step: seen.append((step, line.module.weight.item())) or step == 20
    done = fit(line, tmp_path, minutes=None, resume=False, should_end=check, check_every=10)
    assert [step for step, _ in seen] == [10, 20] and done["step"] == 20 and done["ended"]
    raw = torch.load(tmp_path / "state.pt", weights_only=True)["module"]["weight"].item()
    assert line.module.weight.item() == seen[-1][1] != raw


def test_training_stops_when_its_minutes_are_over(tmp_path):
    slow = Line(steps=10_000)
    slow.loss, original = lambda *a: (time.sleep(0.05), original(*a))[1], slow.loss
    assert 0 < fit(slow, tmp_path, minutes=0.005, resume=False)["step"] < 100
    assert (tmp_path / "state.pt").is_file()


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """timed(seconds of the i-th step, minutes of the run, ...) -> summary, steps made; the losses move the clock."""
    clock = [1000.0]
    monkeypatch.setattr("accel.training.loop.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def run(duration, budget: float, steps: int = 100, **options) -> tuple[dict, list[int]]:
        line, seen = Line(steps), []
        line.optim = line.optim.model_copy(update={"minutes": budget})
        original = line.loss

        def loss(model, step, seed):
            clock[0] += duration(len(seen))
            seen.append(step)
            return original(model, step, seed)

        line.loss = loss
        return fit(line, tmp_path, **{"minutes": None, "resume": False} | options), seen

    return run


def test_a_run_with_too_little_time_skips_steps_and_ends_with_its_whole_schedule(timed, tmp_path):
    """25 seconds for 100 steps of one second: the first five are not counted, the others make four at a time."""
    done, seen = timed(lambda i: 1.0, 25 / 60)
    assert done["step"] == done["steps"] == 100 and done["made"] == len(seen) == 30
    assert seen == sorted(set(seen)) and seen[:6] == [0, 1, 2, 3, 4, 5] and seen[-1] > 90
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] // 20 for line in lines] == [1, 2, 3, 4, 5]


def test_a_run_with_enough_time_makes_every_step(timed, tmp_path):
    done, seen = timed(lambda i: 1.0, 2.0)
    assert seen == list(range(100)) and "made" not in done
    assert torch.load(tmp_path / "state.pt", weights_only=True)["made"] == 100


@pytest.mark.parametrize("slow", [0, 50])
def test_the_time_of_compiling_is_not_counted(slow, timed):
    done, seen = timed(lambda i: 300.0 if i == slow else 1.0, 2.0)
    assert seen == list(range(100)) and "made" not in done


def test_a_resumed_run_has_only_the_rest_of_its_minutes(timed):
    """Of 25 seconds, 15 are over, and five of these are not counted: 85 steps have to fit into 15, and five more."""
    _, before = timed(lambda i: 1.0, 60.0, minutes=14 / 60)
    assert before == list(range(15))
    done, after = timed(lambda i: 1.0, 25 / 60, resume=True)
    assert done["step"] == 100 and done["made"] == 15 + len(after) and len(after) == 20


def test_a_resumed_run_is_not_charged_for_the_compiling_before(timed):
    """300 seconds for compiling and 15 more are over, of 60 that count: there is time for every step."""
    _, before = timed(lambda i: 300.0 if i == 0 else 1.0, 1.0, steps=50, minutes=314 / 60)
    done, after = timed(lambda i: 1.0, 1.0, steps=50, resume=True)
    assert before == list(range(16)) and after == list(range(16, 50)) and "made" not in done


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    broken = Line()
    broken.loss = lambda *a: (broken.module.weight.sum() * float("nan"), {})
    with pytest.raises(AccelError, match="the loss became nan at step 0"):
        fit(broken, tmp_path, minutes=None, resume=False)
