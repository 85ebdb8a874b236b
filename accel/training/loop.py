"""The training loop of all trainers: accelerate, EMA, atomic checkpoints, a JSON line of losses, a sample grid.

A batch depends only on (seed, step, process), so a resumed run follows the loss curve of an unbroken one. A task with
more state than that has `state_dict` and `load_state_dict`, whose tensors have one row per sample.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import AccelError
from ..files import atomic_write
from .fast_blocks import has_fast_bfloat16, keep_freed_memory
from .optimizer import BatchedMuon, OptimConfig, learning_rate

PROGRESS = ("step", "made", "seconds", "uncounted", "ended")  # of a run, in its checkpoint


class Task(Protocol):
    """What a trainer supplies: a module to train, its loss, and a picture of its progress."""

    optim: OptimConfig
    module: nn.Module

    def matrices(self) -> list[nn.Parameter]: ...  # that Muon trains; AdamW trains the rest
    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]: ...
    def sample_grid(self, path: Path) -> None: ...


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The module's parameters that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


def fit(
    task: Task, folder: Path, *, minutes: float | None, resume: bool, save_every: float = 400,
    should_end: Callable[[int], bool] | None = None, check_every: int = 25,
) -> dict:  # fmt: skip
    """Train until the last step, the end of the time, or Ctrl-C; returns a summary. A later `resume` continues.

    `should_end(steps done)` is called every `check_every` steps while the module has its EMA weights; if it is true in
    any process, the run ends in all of them and the summary has "ended". After Ctrl-C the summary has "stopped". Where
    the optimizer's `minutes` made the run skip steps, the summary has "made", the number of those that were not.
    `save_every`: seconds between checkpoints.
    """
    optim = task.optim
    _prepare_folder(folder, resume)
    keep_freed_memory()
    torch.manual_seed(optim.seed)
    accelerator = Accelerator(mixed_precision="bf16" if has_fast_bfloat16(str(PartialState().device)) else "no")
    task.module.to(accelerator.device)  # before `BatchedMuon` takes views of the weights
    optimizers = _optimizers(task)
    ema = EMAModel(trainable(task.module), decay=optim.ema, use_ema_warmup=True, power=0.8, foreach=True)
    done = dict(zip(PROGRESS, (0, 0, 0.0, 0.0, False)))
    if resume:
        done |= _load(folder, task, optimizers, ema)
    step, made, spent, uncounted, ended = (done[name] for name in PROGRESS)
    model, *optimizers = accelerator.prepare(task.module, *optimizers)
    ema.to(accelerator.device)
    began = saved = time.monotonic()
    pace = Pace(optim, spent, uncounted)
    with _journal(folder, accelerator, step, optim.steps) as note, _stop_on_signal() as stopped:
        while step < optim.steps and not ended:
            logs = _step(task, accelerator, model, optimizers, ema, step)
            before, step, made, now = step, pace.next_step(step), made + 1, time.monotonic()
            note(before, step, spent + now - began, logs)
            if should_end and step // check_every > before // check_every:
                with ema_weights(task.module, ema):
                    ended = any_process(should_end(step))
            over = any_process(stopped() or (minutes is not None and now - began > 60 * minutes))
            if ended or step == optim.steps or any_process(over or now - saved > save_every):
                progress = dict(zip(PROGRESS, (step, made, spent + now - began, pace.uncounted, ended)))
                _checkpoint(folder, task, accelerator, model, optimizers, ema, progress)
                saved = time.monotonic()
            if over:
                break
        halted = any_process(stopped())
    ema.copy_to(trainable(task.module))
    flags = {name: True for name, is_set in (("ended", ended), ("stopped", halted)) if is_set}
    flags |= {"made": made} if made < step else {}  # the others were skipped
    return {"step": step, "steps": optim.steps, "seconds": round(spent + time.monotonic() - began, 1), **flags}


class Pace:
    """How many steps of the schedule each training step stands for: 1, or more where a run has too little time.

    The first steps, and later ones that take far longer than usual, compile something: their time is not counted.
    """

    first = 5  # steps that only show how long a step takes
    unusual = 10  # times the usual duration

    def __init__(self, optim: OptimConfig, spent: float, uncounted: float):
        """`spent`: seconds of the run before this process, of which some were not counted."""
        self.uncounted = uncounted
        self.optim, self.durations, self.last = optim, deque(maxlen=20), time.monotonic()
        self.place = 0.0  # in the schedule
        self.end = self.last + 60 * optim.minutes - (spent - uncounted) if optim.minutes else None

    def next_step(self, step: int) -> int:
        """The step that follows a step which has just been made; the same one in all processes."""
        if self.end is None:
            return step + 1
        now = time.monotonic()
        duration, self.last = now - self.last, now
        self.durations.append(duration)
        usual = statistics.median(self.durations)
        left, share, excused = self.optim.steps - step - 1, 1.0, 0.0
        if len(self.durations) <= self.first:
            excused = duration
        elif duration > self.unusual * usual:
            excused = duration - usual
        else:
            share = max(1.0, left / max(1.0, (self.end - now) / usual))
        self.end, self.uncounted = self.end + excused, self.uncounted + excused
        self.place = max(self.place, step) + share
        return min(self.optim.steps, int(broadcast_object_list([self.place])[0]))


def _prepare_folder(folder: Path, resume: bool) -> None:
    """Make the run's folder; without `resume`, delete an earlier state, which a later resume would load."""
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            (folder / "state.pt").unlink(missing_ok=True)
    PartialState().wait_for_everyone()


@contextmanager
def _journal(folder: Path, accelerator: Accelerator, step: int, steps: int):
    """Yield note(step before, step, seconds, logs): it advances a bar, and writes a line of losses every 20 steps."""
    bar = tqdm(total=steps, initial=step, disable=not accelerator.is_local_main_process, smoothing=0.05)
    with bar, open(folder / "log.jsonl", "a" if step else "w") as log:

        def note(before: int, step: int, seconds: float, logs: dict[str, float]) -> None:
            bar.update(step - before)
            if accelerator.is_main_process and step // 20 > before // 20:
                bar.set_postfix({k: f"{v:.4f}" for k, v in logs.items()})
                log.write(json.dumps({"step": step, "seconds": round(seconds, 1), **logs}) + "\n")
                log.flush()

        yield note


def _checkpoint(folder: Path, task, accelerator, model, optimizers, ema: EMAModel, progress: dict) -> None:
    """Write everything that a resumed run needs, and the sample grid."""
    task_state = _gather_task_state(task, accelerator)
    if accelerator.is_main_process:
        _save(folder, accelerator.unwrap_model(model), optimizers, ema, task_state, progress)
        with ema_weights(task.module, ema):
            task.sample_grid(folder / "samples.png")


def _gather_task_state(task: Task, accelerator: Accelerator) -> dict[str, Tensor]:
    """The task's own state, gathered over all processes in their order."""
    state = task.state_dict() if hasattr(task, "state_dict") else {}
    return {name: accelerator.gather(value.to(accelerator.device)).cpu() for name, value in state.items()}


def _optimizers(task: Task) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the task's matrices if it has any."""
    optim, matrices = task.optim, task.matrices()
    rest = [p for p in trainable(task.module) if all(p is not m for m in matrices)]
    rates = dict(lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    adam = torch.optim.AdamW(rest, **rates, fused=True if rest and rest[0].is_cuda else None)
    return [adam, *([BatchedMuon(matrices, lr=optim.matrix_lr, weight_decay=optim.weight_decay)] if matrices else [])]


def any_process(flag: bool) -> bool:
    """Whether the flag is true in any process: all processes must leave a loop together."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    return bool(gather(torch.tensor([flag], device=state.device)).any())


def _step(task, accelerator, model, optimizers, ema, step: int) -> dict[str, float]:
    optim = task.optim
    for optimizer, peak in zip(optimizers, (optim.lr, optim.matrix_lr)):
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate(step, optim)
    seed = (optim.seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index
    with accelerator.autocast():
        loss, logs = task.loss(model, step, seed)
    _check_finite("loss", loss.item(), step)
    accelerator.backward(loss)
    logs["grad"] = float(accelerator.clip_grad_norm_(model.parameters(), optim.clip))
    _check_finite("gradient", logs["grad"], step)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    ema.step(trainable(task.module))
    if accelerator.num_processes > 1:
        loss = accelerator.reduce(loss.detach(), "mean")
    return {"loss": loss.item(), **logs}


def _check_finite(what: str, value: float, step: int) -> None:
    """Raise AccelError for an infinite or undefined number, before it is in the weights."""
    if not math.isfinite(value):
        raise AccelError(
            f"the {what} became {value} at step {step}: resume from the last checkpoint; if it happens again, start "
            "anew with lower learning rates, in accel/training/settings.py"
        )


def _save(folder: Path, module: nn.Module, optimizers, ema: EMAModel, task_state, progress: dict) -> None:
    persistent = module.state_dict().keys()
    buffers = {name: b for name, b in module.named_buffers() if name in persistent}
    weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    state = {"module": {**buffers, **weights}, "ema": ema.state_dict(), "task": task_state}
    state["optimizers"] = [o.state_dict() for o in optimizers]
    save_atomically({**state, **progress}, folder / "state.pt")


def save_atomically(state: dict, file: Path) -> None:
    """`torch.save` that replaces the file only once everything is written."""
    with atomic_write(file) as part:
        torch.save(state, part)


def _load(folder: Path, task: Task, optimizers, ema: EMAModel) -> dict:
    """Load a checkpoint; returns its progress, or nothing without a checkpoint."""
    if not (folder / "state.pt").exists():
        return {}
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    tensors = {**dict(task.module.named_parameters()), **dict(task.module.named_buffers())}
    with torch.no_grad():
        for name in tensors.keys() & state["module"].keys():
            tensors[name].copy_(state["module"][name])
    if state.get("task"):
        task.load_state_dict(state["task"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    ema.load_state_dict(state["ema"])
    return {name: state[name] for name in PROGRESS if name in state}  # one of an earlier version lacks some


@contextmanager
def ema_weights(module: nn.Module, ema: EMAModel):
    """Give the module its EMA weights for the time of the context."""
    ema.store(trainable(module))
    ema.copy_to(trainable(module))
    try:
        yield
    finally:
        ema.restore(trainable(module))


@contextmanager
def _stop_on_signal():
    """Yield a function that says whether Ctrl-C or SIGTERM came: the run ends after the step, with a checkpoint."""
    seen: list[int] = []
    before = {s: signal.signal(s, lambda number, _: seen.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
