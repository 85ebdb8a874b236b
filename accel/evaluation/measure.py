"""The measuring loop of every command: each setting in turn for each prompt, resumable, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from operator import itemgetter

import torch
from tqdm import tqdm

from ..core.hooks import patched_method
from ..errors import AccelError
from ..methods import METHODS
from ..runtime.example_prompts import example_prompts
from ..runtime.generate import Video, environment, generate, preflight, warm_up
from ..runtime.models import ModelDefaults, method_weights, weights
from ..runtime.presets import build_methods
from ..runtime.run import Run, build_run
from .result_log import ResultLog, config_hash
from .suites import Setting

NOISE_SEED = 2**31  # not that of a video; torch takes the lower 32 bits alone
Case = tuple[str, int]  # prompt and seed
Record = Callable[[str, Run, Video, Video], dict]  # setting, run, baseline, video -> what is logged of it


def calibration_cases(n: int, prompt_seed: int, defaults: ModelDefaults) -> list[Case]:
    """Prompts to calibrate a method on, with seeds 0, 1 ...: held-out ones of the toy world, or the example prompts.

    Raises AccelError if the examples are too few.
    """
    if defaults.toy_world:
        from ..world.scene import held_out_prompts

        prompts = held_out_prompts(n, prompt_seed)
    else:
        prompts = example_prompts(defaults)[:n]
        if len(prompts) < n:
            raise AccelError(f"{n} prompts are too many: there are {len(prompts)} examples")
    return [(prompt, seed) for seed, prompt in enumerate(prompts)]


def runs_of(settings: dict[str, Setting], case: Case, defaults: ModelDefaults, **common) -> dict[str, Run]:
    """The run of each setting for a prompt and seed; `common` are arguments of `build_run` that come before its own."""
    common = {key: value for key, value in common.items() if value is not None}
    prompt, seed = case
    return {
        name: build_run(defaults, **{**setting.settings(), "prompt": prompt, "seed": seed, **common})
        for name, setting in settings.items()
    }


def measure_in_turn(
    settings: dict[str, Setting], cases: Sequence[Case], common: dict, log: ResultLog, pipe, defaults: ModelDefaults,
    record: Record, title: str,
) -> list[dict]:  # fmt: skip
    """The log's lines of these cases, after generating what it lacks: one line for each case and setting.

    The settings of a case follow each other, so that a slow minute of the machine affects all of them. The first one is
    the baseline that `record` sees with each video; it is generated again if another one of its case is missing, and
    each line has the time of the baseline that its setting took turns with. A setting for which the memory is too small
    has no lines.
    Of several processes, each generates an equal part of what is missing, and all return all lines.
    """
    done = {(line["prompt"], line["seed"], line["setting"]) for line in log.lines}
    wanted = [(case, name) for case in dict.fromkeys(cases) for name in settings]
    todo = [(case, name) for case, name in wanted if (*case, name) not in done]
    first, last = (len(todo) * (log.state.process_index + i) // log.state.num_processes for i in (0, 1))
    baseline_name, warm, too_large = next(iter(settings)), False, set()
    with tqdm(total=last - first, desc=title, disable=not log.state.is_main_process) as bar:
        for case, group in groupby(todo[first:last], key=itemgetter(0)):
            names = [name for _, name in group]
            runs = runs_of(settings, case, defaults, **common)
            if not warm:
                warm_up(runs[baseline_name], pipe, defaults)
                warm = True
            baseline: Video | None = None
            for name in (n for n in dict.fromkeys((baseline_name, *names)) if n not in too_large):
                try:
                    video, peak_memory = _generate(settings[name], runs[name], pipe, defaults)
                except torch.OutOfMemoryError:
                    if name == baseline_name:
                        raise
                    too_large.add(name)
                    continue
                baseline = baseline or video
                if name in names:
                    facts = {**_speed(video, baseline), "peak_memory_bytes": peak_memory}
                    facts |= record(name, runs[name], baseline, video)
                    log.add(name, prompt=case[0], seed=case[1], **facts)
                    bar.update()
    log.join()
    found = {(line["prompt"], line["seed"], line["setting"]): line for line in reversed(log.lines)}
    lacking = {name for case, name in wanted if (*case, name) not in found}  # in any process
    return [found[(*case, name)] for case, name in wanted if name not in lacking]  # once, also if a line is duplicated


def _generate(setting: Setting, run: Run, pipe, defaults: ModelDefaults) -> tuple[Video, int]:
    """A video, and the most bytes of the GPU that were allocated until its last step (0 on a CPU)."""
    on_gpu, peak = torch.cuda.is_available(), 0

    def on_step(done: int, *_) -> None:
        nonlocal peak
        if on_gpu and done == run.steps:
            peak = torch.cuda.max_memory_allocated()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with perturbed_noise(pipe, setting.noise):
        return generate(run, pipe, defaults, on_step), peak


def refused_settings(settings: dict[str, Setting], pipe, defaults: ModelDefaults, **common) -> dict[str, str]:
    """{setting: why not} of those whose solver or methods a model cannot take, as far as that is known beforehand."""
    refused = {}
    for name, run in runs_of(settings, ("-", 0), defaults, **common).items():
        try:
            preflight(run, pipe)
        except AccelError as error:
            refused[name] = str(error)
    return refused


def refused_peers(settings: dict[str, Setting], case: Case, pipe, defaults: ModelDefaults, **common) -> dict[str, str]:
    """{peer: why not} of those of diffusers' caches that cannot run on a model; each is tried for two steps."""
    tried = {}
    for name, setting in settings.items():
        for peer in [m for m in setting.settings()["methods"] if METHODS[m].peer and m not in tried]:
            run = runs_of({name: setting}, case, defaults, **common)[name]
            try:
                generate(run.model_copy(update={"steps": 2}), pipe, defaults)
                tried[peer] = ""
            except AccelError as error:
                tried[peer] = str(error)
    return {peer: why for peer, why in tried.items() if why}


@contextmanager
def perturbed_noise(pipe, share: float) -> Iterator[None]:
    """Inside the context, the pipeline begins with its own noise and a share of other noise, at the same variance."""

    def prepare(*args, **kwargs) -> torch.Tensor:
        latents = stock(*args, **kwargs)
        generator = torch.Generator().manual_seed(NOISE_SEED)
        other = torch.randn(latents.shape, generator=generator, device="cpu").to(latents)
        other[latents == 0] = 0  # empty channels that some pipelines append
        return (1 - share**2) ** 0.5 * latents + share * other

    stock = pipe.prepare_latents
    with patched_method(pipe, "prepare_latents", prepare) if share else nullcontext():
        yield


def _speed(video: Video, baseline: Video) -> dict:
    """Seconds and FLOPs of a video, and the seconds of its baseline's denoising."""
    seconds = video.seconds
    return {
        "denoise": seconds["denoise"],
        "baseline_denoise": baseline.seconds["denoise"],
        "total": sum(seconds.values()),
        "decode": seconds["decode"],
        "flops": video.trace.flops_computed_and_full()[0],
    }


def by_case(lines: Sequence[dict]) -> list[dict]:
    """Lines of a log as {"prompt", "seed", "rows": {setting: line}}, one for each case."""
    cases: dict[Case, dict] = {}
    for line in lines:
        case = cases.setdefault((line["prompt"], line["seed"]), {})
        case[line["setting"]] = line
    return [{"prompt": prompt, "seed": seed, "rows": rows} for (prompt, seed), rows in cases.items()]


def settings_keys(
    settings: dict[str, Setting], model: str, pipe, defaults: ModelDefaults, ignore: str = "", **common
) -> dict[str, str]:
    """The key of each setting in a log: it changes with all parameters of its methods and of the first setting's, the
    baseline, with the weights and the machine.

    `ignore` names a file of the model that does not matter. The keys ignore the code: delete the log after changing
    what is computed.
    """
    about, shared = {}, [[pair for pair in weights(model) if pair[0] != ignore], environment(pipe)]
    for name, run in runs_of(settings, ("-", 0), defaults, model=model, **common).items():
        methods = build_methods(run.methods)
        parameters = [method.model_dump() for method in methods]
        about[name] = [run.model_dump(), parameters, settings[name].noise, method_weights(methods, model)]
    baseline = next(iter(about.values()))
    return {name: config_hash(baseline, own, *shared) for name, own in about.items()}
