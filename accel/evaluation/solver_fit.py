"""Fits solvers of few steps to a model's own trajectories (see `accel.methods.fittedsolver`).

The baseline of each prompt is recorded once. A solver's noise levels are some of the baseline's. It is fitted step by
step: all prompts advance together, and the weights of a step are those whose sums come closest, over all prompts, to
the baseline's samples at the next of its noise levels. So each step also corrects what the steps before it have missed.
Several spacings are fitted; from the one that ends closest to the baselines, a search moves single steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..core.calls import halves
from ..core.denoising_loop import is_flow, noise_levels
from ..core.hooks import patched_method
from ..errors import AccelError, amount
from ..families import family_of
from ..methods.fittedsolver import FOLDER, FittedSolver, Solver, weighted_sum
from ..runtime.generate import environment, generate, warm_up
from ..runtime.models import ModelDefaults, load_pipeline, model_defaults, write_results
from ..runtime.run import Run, build_run
from ..students.weights import fingerprint
from .measure import calibration_cases

PROMPT_SEED = 77  # other prompts than those of searches and reports
SPACINGS = ((0.12, 0.2, 1), (0.12, 0.35, 1), (0.2, 0.5, 6), (0.35, 0.5, 6), (0.35, 1.0, 6))  # see `spacing`
RIDGE = 1e-5  # of a mean squared element; outputs of neighbouring steps are nearly equal
ROUNDS = 8  # of least squares, each with new weights of the prompts
SMALL_ERROR = 1e-6  # relative and squared: what is closer than that is close enough
MOVES = 20  # a search gives up after so many moves for each of its tries


@dataclass
class Trajectory:
    """The baseline of one prompt: its samples, and its calls at each step, cond first."""

    samples: list[Tensor] = field(default_factory=list)  # steps + 1, in the pipeline's layout
    calls: list[list[dict[str, Any]]] = field(default_factory=list)  # inputs beside the sample
    first: list[Tensor] = field(default_factory=list)  # outputs of the first step


def run_fit(
    model: str, steps: Sequence[int], share: float, guidance: float | None, prompts: int, tries: int, out: Path
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
    warm_up(runs[0], pipe, defaults)
    paths = [record(run, pipe, defaults) for run in tqdm(runs, desc="baselines")]
    levels, times = noise_levels(pipe.scheduler), pipe.scheduler.timesteps.tolist()
    found = {}
    for count in tqdm(steps, desc="solvers"):
        solver, errors = fit(denoiser, paths, levels, times, count, share, runs[0].guidance, tries)
        found[count] = {"errors": errors, "uncond_steps": solver.uncond_steps, "sigmas": solver.sigmas}
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
        if inputs.get("return_dict") is not False:  # the host counts FLOPs: no call of the pipeline
            return
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
    share: float, guidance: float, tries: int = 0,
) -> tuple[Solver, dict[str, float]]:  # fmt: skip
    """The solver of the best list of steps, and the errors: of each spacing by its numbers, and after the search.

    From the best spacing, `tries` lists are tried (see `search`). Raises AccelError if the numbers of the model are not
    finite.
    """
    guided = len(paths[0].calls[0]) > 1
    rollouts = Rollouts(denoiser, paths, uncond_steps(count, share) if guided else [])
    errors, tried = {}, {}
    for shape in SPACINGS:
        if (nodes := spacing(len(times), count, *shape)) not in tried:
            tried[nodes] = rollouts.error(nodes)
            errors[" ".join(f"{number:g}" for number in shape)] = round(tried[nodes], 3)
    nodes = min(tried, key=tried.__getitem__)
    if tries:
        nodes = search(rollouts, nodes, tries)
        errors["after the search"] = round(rollouts.error(nodes), 3)
    solver = Solver(
        steps=count, guidance=guidance, sigmas=[levels[i] for i in nodes], timesteps=[times[i] for i in nodes[:-1]],
        uncond_steps=rollouts.uncond, weights=rollouts.after(nodes).weights, base_fingerprint=fingerprint(denoiser),
    )  # fmt: skip
    return solver, errors


class Arrived(NamedTuple):
    """Where all prompts are after the steps between some nodes, with the weights of those steps."""

    weights: list[list[float]]
    samples: list[Tensor]  # of each prompt, in float32
    outputs: list[list[Tensor]]  # of each prompt, all so far; none at the last noise level


class Rollouts:
    """Fits the weights between nodes. A list that begins as one before it did costs only what differs."""

    def __init__(self, denoiser: nn.Module, paths: Sequence[Trajectory], uncond: Sequence[int]) -> None:
        self.denoiser, self.paths, self.uncond = denoiser, paths, list(uncond)
        self.known: dict[tuple[int, ...], Arrived] = {}

    @torch.no_grad()
    def after(self, nodes: tuple[int, ...]) -> Arrived:
        """All prompts at the last node, after one step between each two nodes; the first node is 0."""
        if nodes not in self.known:
            weights, samples, outputs = [], [path.samples[0] for path in self.paths], [[] for _ in self.paths]
            if len(nodes) > 1:
                before = self.after(nodes[:-1])
                terms = [[sample, *kept] for sample, kept in zip(before.samples, before.outputs)]
                weights = [*before.weights, fit_weights(terms, [path.samples[nodes[-1]] for path in self.paths])]
                samples, outputs = [weighted_sum(weights[-1], of_path) for of_path in terms], before.outputs
            if nodes[-1] < len(self.paths[0].calls):
                branches = 1 + (len(nodes) - 1 in self.uncond)
                at_node = [_outputs(self.denoiser, *at, nodes[-1], branches) for at in zip(self.paths, samples)]
                outputs = [kept + new for kept, new in zip(outputs, at_node)]
            self.known[nodes] = Arrived(weights, samples, outputs)
        return self.known[nodes]

    def error(self, nodes: tuple[int, ...]) -> float:
        """`mean_log_error` at the end."""
        return mean_log_error(self.after(nodes).samples, self.paths)

    def forget_others(self, nodes: tuple[int, ...]) -> None:
        """Keep only what these nodes begin with."""
        self.known = {known: at for known, at in self.known.items() if nodes[: len(known)] == known}


def search(rollouts: Rollouts, nodes: tuple[int, ...], tries: int) -> tuple[int, ...]:
    """The best of the nodes and of `tries` lists that each move one or two nodes of the best one so far a little."""
    rng, best, seen = random.Random(0), rollouts.error(nodes), {nodes}
    with tqdm(total=tries, desc=f"lists of {amount(len(nodes) - 1, 'step')}", leave=False) as bar:
        for _ in range(MOVES * tries):  # where few steps lie between, nearly all moves are soon seen
            moved = list(nodes)
            for i in rng.choices(range(1, len(nodes) - 1), k=rng.choice((1, 1, 2))):
                moved[i] += rng.choice((-3, -2, -1, 1, 2, 3))
            if sorted(set(moved)) != moved or tuple(moved) in seen:
                continue
            seen.add(tuple(moved))
            if (error := rollouts.error(tuple(moved))) < best:
                best, nodes = error, tuple(moved)
            rollouts.forget_others(nodes)
            bar.set_postfix(error=f"{best:.3f}")
            bar.update()
            if bar.n == tries:
                break
    return nodes


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


def fit_weights(terms: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> list[float]:
    """The weights of the sums of terms that come closest to the targets, each prompt counted by its relative error.

    `terms[p][i]` and `targets[p]` have one shape for each p. The mean over the prompts of the logarithm of the squared
    error is minimized, by least squares whose weights are repeatedly set to one over each prompt's squared error: in a
    plain sum of squares, the few prompts whose videos become another scene would decide. In float64, with a small
    penalty on large weights.
    """
    rows = [torch.stack([term.flatten().double() for term in row]) for row in terms]
    ends = [target.flatten().double() for target in targets]
    squares = torch.stack([y @ y for y in ends])
    grams = torch.stack([a @ a.T for a in rows]) / squares[:, None, None]
    rights = torch.stack([a @ y for a, y in zip(rows, ends)]) / squares[:, None]
    penalty = RIDGE * ends[0].numel() / squares.mean() * torch.eye(grams.shape[-1], dtype=torch.float64)
    share = torch.ones_like(squares)
    for _ in range(ROUNDS):
        share = share / share.mean()
        gram, right = (share[:, None, None] * grams).mean(0), (share[:, None] * rights).mean(0)
        weights = torch.linalg.solve(gram + penalty, right)
        errors = 1 - 2 * rights @ weights + torch.einsum("i,pij,j->p", weights, grams, weights)
        share = 1 / (errors.clamp(min=0) + SMALL_ERROR)
    return weights.tolist()


def save(solver: Solver, model: str, out: Path) -> list[Path]:
    """The files of a solver, after writing them: in `out`, and in a local model's folder."""
    return write_results(model, out, f"{solver.steps}.json", solver.model_dump_json(), FOLDER)
