"""One training loop for all trainers: accelerate, EMA, atomic checkpoints, a JSON line of losses, a sample sheet.

Batches depend on (seed, step, process) alone, so a resumed run follows the loss curve of an unbroken one. A task that
carries more than that from step to step has `state_dict` and `load_state_dict`, one row per sample.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, Field
from torch import Tensor, nn
from tqdm import tqdm

from ..files import whole
from .speed import has_fast_bfloat16


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """What all trainers share. `steps` fixes the learning-rate schedule; `--minutes` only cuts a run into chunks."""

    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    matrix_lr: float = Field(6e-3, gt=0)  # of Muon, for the task's `matrices`; AdamW's `lr` is for the rest
    warmup: int = 100
    decay_from: float = 0.4  # share of the steps after which the rate falls linearly to zero
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0


class Task(Protocol):
    """What a trainer brings: one module to train, its loss, and a picture of how far it is."""

    recipe: Recipe
    module: nn.Module

    def matrices(self) -> list[nn.Parameter]: ...  # that Muon trains; AdamW trains the rest
    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]: ...
    def sheet(self, path: Path) -> None: ...


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn; of a model with adapters these are few."""
    return [p for p in module.parameters() if p.requires_grad]


def rate(step: int, recipe: Recipe) -> float:
    """Share of the peak learning rate at a step: linear warm-up, constant, linear decay."""
    start = recipe.decay_from * recipe.steps
    decay = min(1.0, (recipe.steps - step) / max(1.0, recipe.steps - start))
    return min(1.0, (step + 1) / recipe.warmup) * decay


def fit(
    task: Task, folder: Path, *, minutes: float | None, resume: bool, save_every: float = 400,
    look: Callable[[int], bool] = lambda step: False, every: int = 25,
) -> dict:  # fmt: skip
    """Train until the recipe's last step, the time or Ctrl-C; a summary of where it stands. Resumable always.

    `look(steps done)` is called every so many steps while the module has its averaged weights; if it is true in any
    process, the run ends in all alike, and the summary has "ended". After Ctrl-C it has "stopped".
    """
    recipe = task.recipe
    _prepare(folder, resume)
    torch.manual_seed(recipe.seed)
    accelerator = Accelerator(mixed_precision="bf16" if has_fast_bfloat16(str(PartialState().device)) else "no")
    task.module.to(accelerator.device)  # before `Matrices` takes its views
    optimizers = _optimizers(task)
    ema = EMAModel(trained(task.module), decay=recipe.ema, use_ema_warmup=True, power=0.8, foreach=True)
    step, spent, ended = _load(folder, task, optimizers, ema) if resume else (0, 0.0, False)
    model, *optimizers = accelerator.prepare(task.module, *optimizers)
    ema.to(accelerator.device)
    began = saved = time.monotonic()
    with _journal(folder, accelerator, step, recipe.steps) as note, _stop_on_signal() as stopped:
        while step < recipe.steps and not ended:
            logs = _step(task, accelerator, model, optimizers, ema, step)
            step, now = step + 1, time.monotonic()
            note(step, spent + now - began, logs)
            if step % every == 0:
                with averaged(task.module, ema):
                    ended = anyone(look(step))
            over = anyone(stopped() or (minutes is not None and now - began > 60 * minutes))
            if ended or step == recipe.steps or anyone(over or now - saved > save_every):
                stand = {"step": step, "seconds": spent + now - began, "ended": ended}
                _checkpoint(folder, task, accelerator, model, optimizers, ema, stand)
                saved = time.monotonic()
            if over:
                break
        halted = anyone(stopped())
    ema.copy_to(trained(task.module))
    told = {name: True for name, so in (("ended", ended), ("stopped", halted)) if so}
    return {"step": step, "steps": recipe.steps, "seconds": round(spent + time.monotonic() - began, 1), **told}


def _prepare(folder: Path, resume: bool) -> None:
    """The folder of a run, without an earlier one's state if that is not resumed: else a later `resume` would be."""
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            (folder / "state.pt").unlink(missing_ok=True)
    PartialState().wait_for_everyone()


@contextmanager
def _journal(folder: Path, accelerator: Accelerator, step: int, steps: int):
    """Inside, note(step, seconds, logs) moves a bar on, and writes a line of losses every 20 steps."""
    bar = tqdm(total=steps, initial=step, disable=not accelerator.is_local_main_process, smoothing=0.05)
    with bar, open(folder / "log.jsonl", "a" if step else "w") as log:

        def note(step: int, seconds: float, logs: dict[str, float]) -> None:
            bar.update()
            if accelerator.is_main_process and step % 20 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in logs.items()})
                log.write(json.dumps({"step": step, "seconds": round(seconds, 1), **logs}) + "\n")
                log.flush()

        yield note


def _checkpoint(folder: Path, task, accelerator, model, optimizers, ema: EMAModel, stand: dict) -> None:
    """Put all that a resumed run needs into the folder, with where it stands, and the picture."""
    carried = _carried(task, accelerator)
    if accelerator.is_main_process:
        _save(folder, accelerator.unwrap_model(model), optimizers, ema, carried, stand)
        with averaged(task.module, ema):
            task.sheet(folder / "sheet.png")


def _carried(task: Task, accelerator: Accelerator) -> dict[str, Tensor]:
    """What a task carries, of all processes in their order."""
    state = task.state_dict() if hasattr(task, "state_dict") else {}
    return {name: accelerator.gather(value.to(accelerator.device)).cpu() for name, value in state.items()}


def _optimizers(task: Task) -> list[torch.optim.Optimizer]:
    """Muon for the task's matrices if it has any, AdamW for the rest."""
    recipe, hidden = task.recipe, task.matrices()
    rest = [p for p in trained(task.module) if all(p is not m for m in hidden)]
    adam = torch.optim.AdamW(rest, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    return [adam, *([Matrices(hidden, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay)] if hidden else [])]


class Matrices(torch.optim.Muon):
    """Muon with steps whose size is that of AdamW's (Liu et al., arXiv 2502.16982); a kernel has a row per output.

    Matrices of one shape take their steps together, up to so many numbers: for tiny-wan's 80 that is a seventh of the
    operators, and 0.6 of the time on two CPU cores.
    """

    together = 2**26

    def __init__(self, weights: list[nn.Parameter], **options):
        self.weights = weights
        flat = [nn.Parameter(w.data.flatten(1)) for w in weights]  # views: a step on them is a step on the weights
        super().__init__(flat, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # accelerate hands one on, which is None
        (group,) = self.param_groups
        alike: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for weight, flat in zip(self.weights, group["params"], strict=True):
            if weight.grad is not None:
                grad, state = weight.grad.flatten(1), self.state[flat]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                alike.setdefault(flat.shape, []).append((flat, grad, state["momentum_buffer"]))
        for shape, rows in alike.items():
            most = max(1, self.together // shape.numel())
            for first in range(0, len(rows), most):
                self._together(group, *map(list, zip(*rows[first : first + most])))

    def _together(self, group: dict, flats: list[Tensor], grads: list[Tensor], means: list[Tensor]) -> None:
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        ahead = torch.stack(grads).lerp_(torch.stack(means), group["momentum"])  # Nesterov's
        steps = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_(flats, 1 - group["lr"] * group["weight_decay"])
        size = 0.2 * group["lr"] * math.sqrt(max(flats[0].shape))
        torch._foreach_add_(flats, list(steps.to(flats[0].dtype).contiguous()), alpha=-size)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (k, m, n) with their singular values brought near 1, by Newton-Schulz iterations.

    In bfloat16 where that is fast.
    """
    a, b, c = coefficients
    y = x.bfloat16() if has_fast_bfloat16(str(x.device)) else x.float()
    if tall := y.shape[1] > y.shape[2]:
        y = y.mT
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def anyone(mine: bool) -> bool:
    """True in all processes if it is true in one: they must leave a loop together."""
    state = PartialState()
    if state.num_processes == 1:
        return mine
    return bool(gather(torch.tensor([mine], device=state.device)).any())


def _step(task, accelerator, model, optimizers, ema, step: int) -> dict[str, float]:
    recipe = task.recipe
    for optimizer, peak in zip(optimizers, (recipe.lr, recipe.matrix_lr)):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step, recipe)
    seed = (recipe.seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index
    with accelerator.autocast():
        loss, logs = task.loss(model, step, seed)
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the loss became {loss.item()} at step {step}: lower the learning rate and resume")
    accelerator.backward(loss)
    logs["grad"] = float(accelerator.clip_grad_norm_(model.parameters(), recipe.clip))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    ema.step(trained(task.module))
    if accelerator.num_processes > 1:
        loss = accelerator.reduce(loss.detach(), "mean")
    return {"loss": loss.item(), **logs}


def _save(folder: Path, module: nn.Module, optimizers, ema: EMAModel, carried, stand: dict) -> None:
    lasting = module.state_dict().keys()
    buffers = {name: b for name, b in module.named_buffers() if name in lasting}
    learnt = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    state = {"module": {**buffers, **learnt}, "ema": ema.state_dict(), "carried": carried}
    state["optimizers"] = [o.state_dict() for o in optimizers]
    save_whole({**state, **stand}, folder / "state.pt")


def save_whole(state: dict, file: Path) -> None:
    """Save it in place of what is there, whole or not at all."""
    with whole(file) as part:
        torch.save(state, part)


def _load(folder: Path, task: Task, optimizers, ema: EMAModel) -> tuple[int, float, bool]:
    """Steps and seconds done, and whether a look has ended the run."""
    if not (folder / "state.pt").exists():
        return 0, 0.0, False
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    own = {**dict(task.module.named_parameters()), **dict(task.module.named_buffers())}
    with torch.no_grad():
        for name in own.keys() & state["module"].keys():
            own[name].copy_(state["module"][name])
    if state.get("carried"):
        task.load_state_dict(state["carried"])
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    ema.load_state_dict(state["ema"])
    return state["step"], state["seconds"], state["ended"]


@contextmanager
def averaged(module: nn.Module, ema: EMAModel):
    """Inside, the module holds the averaged weights."""
    ema.store(trained(module))
    ema.copy_to(trained(module))
    try:
        yield
    finally:
        ema.restore(trained(module))


@contextmanager
def _stop_on_signal():
    """Ctrl-C and SIGTERM end the run after the current step, so that the checkpoint is whole."""
    seen: list[int] = []
    before = {s: signal.signal(s, lambda number, _: seen.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
