"""Fits solvers of few steps to a model's own trajectories (see `accel.methods.fittedsolver`).

The baseline of each prompt is recorded once. A solver's noise levels are some of the baseline's. It is fitted step by
step: all prompts advance together, and the weights of a step are those whose sums come closest, over all prompts, to
the baseline's samples at the next of its noise levels. So each step also corrects what the steps before it have missed.
Several spacings are fitted; the one that ends closest to the baselines is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..core.denoising_loop import is_flow, noise_levels
from ..core.hooks import patched_method
from ..core.host import halves
from ..errors import AccelError, amount
from ..families import family_of
from ..files import atomic_write
from ..methods.fittedsolver import FOLDER, FittedSolver, Solver, weighted_sum
from ..runtime.generate import environment, generate, warm_up
from ..runtime.models import ModelDefaults, folders_of_results, load_pipeline, model_defaults
from ..runtime.run import Run, build_run
from ..students.weights import fingerprint
from .measure import calibration_cases

PROMPT_SEED = 77  # other prompts than those of searches and reports
SPACINGS = ((0.12, 0.2, 1), (0.12, 0.35, 1), (0.2, 0.5, 6), (0.35, 0.5, 6), (0.35, 1.0, 6))  # see `spacing`
RIDGE = 1e-5  # of a mean squared element; outputs of neighbouring steps are nearly equal


@dataclass
class Trajectory:
    """The baseline of one prompt: its samples, and its calls at each step, cond first."""

    samples: list[Tensor] = field(default_factory=list)  # steps + 1, in the pipeline's layout
    calls: list[list[dict[str, Any]]] = field(default_factory=list)  # inputs beside the sample
    first: list[Tensor] = field(default_factory=list)  # outputs of the first step


def run_fit(
    model: str, steps: Sequence[int], share: float, guidance: float | None, prompts: int, out: Path
) -> dict:  # fmt: skip
    """What was fitted, after writing one file for each step count; a local model gets a copy.

    `share` of the steps run the unconditional branch. Raises AccelError for step counts that the method does not have,
    or a model whose calls cannot be repeated.
    """
    known = get_args(FittedSolver.model_fields["steps"].annotation)[1:]
    if unknown := [n for n in steps if n not in known]:
        raise AccelError(f"no solver has {amount(unknown[0], 'step')}: choose from {', '.join(map(str, known))}")
    pipe = load_pipeline(model)
    defaults, denoiser = model_defaults(pipe, model), check_pipeline(pipe)
    cases = calibration_cases(prompts, PROMPT_SEED, defaults)
    runs = [build_run(defaults, model=model, prompt=prompt, seed=seed, guidance=guidance) for prompt, seed in cases]
    if max(steps) >= runs[0].steps:
        raise AccelError(f"a solver of {amount(max(steps), 'step')} saves nothing: the baseline has {runs[0].steps}")
    warm_up(runs[0], pipe, defaults)  # which also counts FLOPs, by a call that is no step
    paths = [record(run, pipe, defaults) for run in tqdm(runs, desc="baselines")]
    levels, times = noise_levels(pipe.scheduler), pipe.scheduler.timesteps.tolist()
    found = {}
    for count in tqdm(steps, desc="solvers"):
        solver, errors = fit(denoiser, paths, levels, times, count, share, runs[0].guidance)
        found[count] = {"spacings": errors, "uncond_steps": solver.uncond_steps, "sigmas": solver.sigmas}
        found[count]["written"] = [str(file) for file in save(solver, model, out)]
    about = {"model": model, "baseline_steps": runs[0].steps, "prompts": prompts, **environment(pipe)}
    return {**about, "solvers": found}


def check_pipeline(pipe) -> nn.Module:
    """The pipeline's transformer. Raises AccelError if its calls cannot be repeated one by one."""
    denoisers = family_of(pipe).denoisers(pipe)
    if len(denoisers) > 1 or not is_flow(pipe.scheduler):
        raise AccelError(
            f"no solver can be fitted to this {type(pipe).__name__}: it needs one transformer and a scheduler for flow "
            "matching"
        )
    return denoisers[0]


@torch.no_grad()
def record(run: Run, pipe, defaults: ModelDefaults) -> Trajectory:
    """The trajectory of a run. Raises AccelError if the model's input or output has another shape than the sample."""
    path, step, shapes = Trajectory(), pipe.scheduler.step, set()
    is_batch = family_of(pipe).batches_guidance and run.guidance > 1

    def on_call(model: nn.Module, args: tuple, inputs: dict[str, Any], output: Any) -> None:
        if len(path.calls) == max(0, len(path.samples) - 1):
            path.calls.append([])
        x = inputs["hidden_states"]
        branches = halves(x, inputs)[::-1] if is_batch else [(x, inputs)]
        shapes.update(half.shape for half, _ in branches)
        path.calls[-1] += [{**inputs, "hidden_states": None, "return_dict": False} for _, inputs in branches]
        if len(path.calls) == 1:
            path.first += [y.clone().cpu() for y in (output[0].chunk(2)[::-1] if is_batch else output[:1])]

    def on_step(output: Tensor, time: Tensor, sample: Tensor, *args, **named):
        if not path.samples:
            path.samples.append(sample.clone().cpu())
        result = step(output, time, sample, *args, **named)
        path.samples.append(result[0].clone().cpu())  # some pipelines write into it
        return result

    with ExitStack() as stack:
        stack.enter_context(patched_method(pipe.scheduler, "step", on_step))
        stack.callback(pipe.transformer.register_forward_hook(on_call, with_kwargs=True).remove)
        generate(run, pipe, defaults)
    if shapes | {path.first[0].shape} != {path.samples[0].shape}:
        raise AccelError("no solver can be fitted: the model takes or gives another shape than that of the sample")
    if len(path.calls) != run.steps:
        calls = len(path.calls)
        raise AccelError(f"no solver can be fitted: the scheduler evaluates {calls} times in {run.steps} steps")
    return path


def spacing(total: int, count: int, early: float, late: float, power: float) -> tuple[int, ...]:
    """Where `count` steps begin among the `total` steps of the baseline, and `total`.

    The gap at a place u from 0 to 1 is proportional to (u + early) (1 - (1 - late) u^power): at the beginning, errors
    change the scene, and at the end the fine detail appears. So both ends need more steps than what is between; a high
    `power` lets the gaps grow until shortly before the end.
    """
    places = [i / max(1, count - 1) for i in range(count)]
    gaps = [(u + early) * (1 - (1 - late) * u**power) for u in places]
    nodes = [0]
    for i, reached in enumerate(accumulate(gaps[:-1]), 1):
        nodes.append(min(max(round(total * reached / sum(gaps)), nodes[-1] + 1), total - count + i))
    return (*nodes, total)


def uncond_steps(count: int, share: float) -> list[int]:
    """The share of the steps, evenly spread from the first to the last."""
    number = max(2, round(share * count)) if share else 0
    return sorted({round(i * (count - 1) / (number - 1)) for i in range(number)})


def fit(
    denoiser: nn.Module, paths: Sequence[Trajectory], levels: Sequence[float], times: Sequence[float], count: int,
    share: float, guidance: float,
) -> tuple[Solver, dict[str, float]]:  # fmt: skip
    """The solver of the best spacing, and the error of each one that was tried, by its numbers.

    Raises AccelError if the numbers of the model are not finite.
    """
    guided = len(paths[0].calls[0]) > 1
    uncond = uncond_steps(count, share) if guided else []
    tried = {}
    for shape in SPACINGS:
        if (nodes := spacing(len(times), count, *shape)) not in tried:
            weights, ends = fit_weights(denoiser, paths, nodes, uncond)
            tried[nodes] = mean_log_error(ends, paths), weights, " ".join(f"{number:g}" for number in shape)
    nodes = min(tried, key=lambda nodes: tried[nodes][0])
    weights = tried[nodes][1]
    solver = Solver(
        steps=count, guidance=guidance, sigmas=[levels[i] for i in nodes], timesteps=[times[i] for i in nodes[:-1]],
        uncond_steps=uncond, weights=weights, base_fingerprint=fingerprint(denoiser),
    )  # fmt: skip
    return solver, {shape: round(error, 3) for error, _, shape in tried.values()}


@torch.no_grad()
def fit_weights(
    denoiser: nn.Module, paths: Sequence[Trajectory], nodes: Sequence[int], uncond: Sequence[int]
) -> tuple[list[list[float]], list[Tensor]]:
    """The weights of each step between the nodes, and each prompt's sample at the end, in float32."""
    samples, outputs = [path.samples[0] for path in paths], [[] for _ in paths]
    weights: list[list[float]] = []
    for step, (node, following) in enumerate(zip(nodes, nodes[1:])):
        for path, sample, kept in zip(paths, samples, outputs):
            kept += _outputs(denoiser, path, sample, node, 1 + (step in uncond))
        terms = [[sample, *kept] for sample, kept in zip(samples, outputs)]
        weights.append(least_squares(terms, [path.samples[following] for path in paths]))
        samples = [weighted_sum(weights[-1], of_path) for of_path in terms]
    return weights, samples


def mean_log_error(ends: Sequence[Tensor], paths: Sequence[Trajectory]) -> float:
    """Mean over the prompts of log10 of the squared error at the end, relative to the baseline's square.

    A mean of squares would be that of the few prompts whose videos become another scene. Raises AccelError if it is not
    finite.
    """
    targets = [path.samples[-1].float() for path in paths]
    errors = [((x - target).square().sum() / target.square().sum()).log10() for x, target in zip(ends, targets)]
    error = float(torch.stack(errors).mean())
    if not math.isfinite(error):
        raise AccelError("no solver can be fitted: the model gave numbers that are not finite")
    return error


def _outputs(denoiser: nn.Module, path: Trajectory, sample: Tensor, node: int, branches: int) -> list[Tensor]:
    """The outputs of the first branches for a sample at a node; those of the first step are recorded."""
    if node == 0:
        return path.first[:branches]
    x = sample.to(denoiser.device, denoiser.dtype)
    return [denoiser(**{**inputs, "hidden_states": x})[0].cpu() for inputs in path.calls[node][:branches]]


def least_squares(terms: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> list[float]:
    """The weights of the sums of terms that come closest to the targets, over all of their elements.

    `terms[p][i]` and `targets[p]` have one shape for each p. In float64, with a small penalty on large weights.
    """
    size, count = len(terms[0]), 0
    gram, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for row, target in zip(terms, targets, strict=True):
        a = torch.stack([term.flatten().double() for term in row])
        gram, right, count = gram + a @ a.T, right + a @ target.flatten().double(), count + target.numel()
    return torch.linalg.solve(gram + RIDGE * count * torch.eye(size, dtype=torch.float64), right).tolist()


def save(solver: Solver, model: str, out: Path) -> list[Path]:
    """The files of a solver, after writing them: in `out`, and in a local model's folder."""
    files = [folder / f"{solver.steps}.json" for folder in folders_of_results(model, out, FOLDER)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as part:
            part.write_text(solver.model_dump_json())
    return files
