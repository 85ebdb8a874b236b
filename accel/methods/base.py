"""What every method is: a frozen value whose fields are the paper's parameters, with one verb, `apply`.

Importing this package must not import torch: help, presets and refused settings do not need it. So a method imports
what runs a model inside the function that uses it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from pydantic import AfterValidator, BaseModel, Field, model_validator

from ..core.trace import DENOISER, Action, Trace
from ..errors import AccelError, amount
from ..students.manifest import load_manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..core.foreign import ForeignCache
    from ..core.host import Host
    from ..families import Family

MIN_CACHED_STEPS = 10  # with fewer steps in a run, neighbouring ones differ too much to replace each other
WORKING_TENSORS = 16  # of all tokens, that a forward pass itself needs at most, about; measured at the size of Wan 1.3B


class RunSpec(NamedTuple):
    """What is known of a run before it begins."""

    model: nn.Module  # the denoiser
    family: Family
    latents: Tensor  # (b, ...) in the family's layout; only its shape and dtype are used
    grid: tuple[int, int, int]  # tokens (f, h, w)
    count: int  # number of steps
    guided: bool  # whether an unconditional branch runs
    num_layers: int  # video self-attentions of the denoiser
    text_tokens: int = 0  # of one sample, that joint attention has beside the video's
    model_path: str = "nowhere"  # folder or hub id of the pipeline; its students are in that folder
    guidance: float | None = None  # scale; None where it is not known

    @property
    def tokens(self) -> int:
        """Video tokens of all samples."""
        return math.prod(self.grid) * len(self.latents)

    @property
    def token_bytes(self) -> int:
        """Bytes of the hidden state of one token."""
        return self.family.hidden_size(self.model) * self.latents.element_size()


def model_path(host: Host) -> str:
    """The pipeline's folder or hub id; "nowhere" for a pipeline that was built in memory."""
    return host.pipe.name_or_path or "nowhere"


def run_spec(host: Host) -> RunSpec:
    """The spec of the run that the host has just begun."""
    return RunSpec(
        model=host.denoisers[host.active_index], family=host.family, latents=host.latents, grid=host.grid,
        count=host.step.count, guided=host.is_run_guided, num_layers=len(host.attentions[host.active_index]),
        text_tokens=host.text_tokens, model_path=model_path(host),
    )  # fmt: skip


def report_estimate(method: Method, spec: RunSpec, trace: Trace) -> None:
    """Add a method's memory estimate to the trace, with a warning if the GPU has not so much left for all methods."""
    trace.estimated_bytes += method.estimate_memory(spec)
    if spec.latents.is_cuda:
        caches = trace.estimated_bytes - sum(trace.memory_by_method.values())  # without what is there already
        free = free_memory(spec.latents.device) - WORKING_TENSORS * spec.tokens * spec.token_bytes
        if caches > free:
            trace.add_message(
                f"{method.title} may run out of memory: up to {caches / 2**30:.1f} GiB will be cached, and about "
                f"{max(0, free) / 2**30:.1f} GiB of the GPU are left for that; make the video smaller, or set "
                "fastercache.cache_format, fastercache.max_cache_gib, fastercache.reuse = stack or "
                "asymrnr.correction = none"
            )


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that torch can still allocate."""
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@dataclass
class FullStepRun:
    """Which steps of one run are full ones: some are planned, and the first branch of a step decides for all."""

    planned: list[int] | None  # None: it depends on the video
    full_steps: list[int] = field(default_factory=list)  # so far
    step: int = -1  # the last one that was decided

    @property
    def is_full(self) -> bool:
        """Whether the last step that was decided is a full one."""
        return self.full_steps[-1:] == [self.step]


def too_few_steps(method: type[Method], count: int) -> str:
    """Why a cache is off in a run of so many steps, in a sentence; empty where there are enough."""
    few = amount(count, "step is", "steps are")
    off = f"{method.title} is off: {few} too few, it needs at least {MIN_CACHED_STEPS}"
    return off if count < MIN_CACHED_STEPS else ""


def outside_blocks(family: Family, model: nn.Module, flops: dict[str, int]) -> int:
    """FLOPs of a call without its blocks: of the embedding and the head."""
    return flops[DENOISER] - sum(flops[name] for name in family.block_names(model))


def record_prediction(host: Host, trace: Trace, flops: int = 0) -> float:
    """Record that the blocks of this call are predicted, which costs `flops`; returns the share of work left."""
    left = outside_blocks(host.family, host.denoisers[host.active_index], trace.flops) + flops
    share = left / trace.flops[DENOISER]
    trace.record(host.step, DENOISER, "predict", share)
    trace.discard(host.step, host.attentions[host.active_index])
    return share


def _rising_from_0(full_steps: str) -> str:
    try:
        steps = [int(word) for word in full_steps.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"full_steps = {full_steps!r} are not whole numbers") from None
    if steps and (steps[0] != 0 or sorted(set(steps)) != steps):
        raise ValueError(f"full_steps = {full_steps!r} must rise from 0: before the first one nothing is cached")
    return " ".join(map(str, steps))


FullSteps = Annotated[str, AfterValidator(_rising_from_0)]  # indices of steps, as "0 1 2 5 9"; empty for none
Choices = list | tuple[float, float]  # the possible values of a parameter, or the lowest and the highest


class Method(BaseModel, frozen=True, extra="forbid"):
    """A reversible change to how a denoiser is evaluated.

    Parameters are `Field(default, ge=, le=, multiple_of=, description=)`: widgets, CLI flags, preset checks and the
    docs' tables are generated from them. One with `json_schema_extra={"page": False}` is for presets and Python only.
    `neutral` holds settings at which the output is bitwise the baseline's. `basic` are the parameters to turn first;
    the page shows the others under "Advanced".
    """

    title: ClassVar[str]
    paper: ClassVar[str]  # such as "arXiv 2410.19355"; empty for a method of ours
    neutral: ClassVar[dict] = {}
    peer: ClassVar[bool] = False  # somebody else's cache, to be compared with; it runs alone
    basic: ClassVar[tuple[str, ...]]

    @classmethod
    def parameters(cls) -> dict[str, dict]:
        """The JSON schema of each parameter that the page shows."""
        return {k: v for k, v in cls.model_json_schema()["properties"].items() if v.get("page", True)}

    @classmethod
    def available_values(cls, model: str | Path) -> dict[str, Choices]:
        """For a model's folder, the values of those parameters that are restricted to what was trained for it.

        An empty list means that nothing was trained.
        """
        return {}

    @property
    def is_neutral(self) -> bool:
        """Whether the settings are those at which the output is bitwise the baseline's."""
        return bool(self.neutral) and all(getattr(self, name) == value for name, value in self.neutral.items())

    @property
    def predicts_blocks(self) -> bool:
        """Whether some steps get what all blocks give without running them; one method of a run can do so."""
        return False

    def weights_dir(self, model: str | Path) -> Path | None:
        """The folder of the weights that this method loads for a model; None if it needs none."""
        return None

    @classmethod
    def is_installed(cls) -> bool:
        """Whether the packages are there that only this method needs."""
        return True

    @property
    def names_weights(self) -> bool:
        """Whether its settings say where its weights are, which are then not looked for in the model's folder."""
        return False

    def is_available(self, model: str | Path) -> bool:
        """Whether all that this method loads for a model is there."""
        weights_dir = self.weights_dir(model)
        return self.is_installed() and (weights_dir is None or weights_dir.is_dir())

    def files(self, model: str | Path) -> list[Path]:
        """The files that this method reads besides the model's own."""
        weights_dir = self.weights_dir(model)
        return sorted(p for p in weights_dir.glob("*") if p.is_file()) if weights_dir else []

    def required_settings(self) -> dict[str, float]:
        """The values of `steps` and `guidance` that a run with this method must have; empty for most methods."""
        return {}

    def estimate_memory(self, spec: RunSpec) -> int:
        """Upper bound in bytes of what the method caches during a run, known before it starts."""
        return 0

    def expected_work(self, spec: RunSpec, flops: dict[str, int]) -> float | None:
        """The share of a full run's FLOPs that is left, if it is known before the run; else None.

        `flops` are those of a full call of the denoiser under "denoiser", and of its modules by name.
        """
        return None

    def check(self, spec: RunSpec) -> None:
        """Raise AccelError for a run that the method is not made for, as far as that is known before it starts."""

    def inactive_reason(self, spec: RunSpec) -> str:
        """Why the method cannot save anything in a run, as far as that is known before it starts; else empty."""
        return ""

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the host's layers inside the context; on exit everything is as before, also after an error."""
        raise NotImplementedError
        yield


class StudentMethod(Method):
    """A method that runs a student's weights in place of the denoiser's. Its field `steps` is 0 for no student."""

    manifest_file: ClassVar[str]  # such as "gpd.json"
    manifest_type: ClassVar[type[BaseModel]]

    student: str = Field(
        "", description="Folder of a student; empty: the one in the model's folder.", json_schema_extra={"page": False}
    )

    @model_validator(mode="after")
    def _unused_student_exists(self) -> StudentMethod:
        if self.student and not self.steps:  # a student in use is checked when the method is applied
            self.load_manifest(Path(self.student))
        return self

    @classmethod
    def load_manifest(cls, folder: Path) -> BaseModel:
        """The manifest of the student in a folder. Raises AccelError if there is none or it is not valid."""
        name = cls.manifest_file.removesuffix(".json")
        return load_manifest(folder, cls.manifest_file, cls.manifest_type, f"{name}.student", f"train {name}")

    @property
    def names_weights(self) -> bool:
        """With the folder of a student."""
        return bool(self.student)

    def default_dir(self, model: str | Path) -> Path:
        """The student's folder inside the model's."""
        raise NotImplementedError

    def weights_dir(self, model: str | Path) -> Path | None:
        """The student's folder; None without a student."""
        return (Path(self.student) if self.student else self.default_dir(model)) if self.steps else None

    def expected_work(self, spec: RunSpec, flops: dict[str, int]) -> float:
        """All of it: a student computes its steps in full."""
        return 1.0

    def estimate_memory(self, spec: RunSpec) -> int:
        """The bytes of the base model's weights, which stay in memory while the student's run."""
        from ..students.loading import weight_bytes

        return weight_bytes(self.weights_dir(spec.model_path), spec.model) if self.steps else 0


def check_combination(methods: Sequence[Method]) -> None:
    """Raise AccelError if methods cannot run together.

    A peer is alone, as neither side would see what the other one skips. Of two methods that predict all blocks, one
    would learn from the other's predictions. Two of one kind would share their place in the trace.
    """
    for kind, number in Counter(map(type, methods)).items():
        if number > 1:
            raise AccelError(f"{kind.title} is given {number} times: give it once")
    for method in methods:
        if method.peer and len(methods) > 1:
            others = " and ".join(other.title for other in methods if other is not method)
            raise AccelError(f"{method.title} and {others} do not go together: a peer runs alone")
    if len(predicting := [method.title for method in methods if method.predicts_blocks]) > 1:
        raise AccelError(f"{' and '.join(predicting)} do not go together: each stands in for all blocks in some steps")


@dataclass
class Skipped:
    """Whether a run has skipped anything so far."""

    anything: bool = False


class Peer(Method):
    """A cache of diffusers or of another package on every denoiser, as it is, with what it skips counted."""

    peer: ClassVar[bool] = True
    action: ClassVar[Action] = "predict"  # what stands in for a skipped module
    skips_blocks: ClassVar[bool] = False  # it takes all blocks for one stack

    def new_cache(self, host: Host, model: nn.Module) -> ForeignCache:
        """The cache for one denoiser, which the host puts on."""
        raise NotImplementedError

    def num_full_steps(self, count: int) -> int:
        """How many of `count` steps are computed in full whatever the video is."""
        return 1

    def cached_states(self, spec: RunSpec) -> float:
        """How many hidden states of one branch the cache holds at most."""
        raise NotImplementedError

    def estimate_memory(self, spec: RunSpec) -> int:
        """Bytes of the cached hidden states of all branches."""
        tokens = spec.tokens + len(spec.latents) * spec.text_tokens
        state = tokens * spec.token_bytes
        return 0 if self.inactive_reason(spec) else round((1 + spec.guided) * self.cached_states(spec) * state)

    def inactive_reason(self, spec: RunSpec) -> str:
        """Neutral settings, or too few steps."""
        if self.is_neutral:
            return f"{self.title} does nothing: at this setting every step is computed in full"
        if spec.count <= (full := self.num_full_steps(spec.count)):
            few = amount(spec.count, "step is", "steps are")
            return f"{self.title} does nothing: {few} too few, as it computes {full} in full"
        return ""

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Enable the cache inside the context. Raises AccelError for a model on which it cannot run."""
        for model in host.denoisers:
            self.check_model(host.family, model)
        skipped = host.per_run(lambda: self._begin(host, trace))

        def denoise(inner: Callable[..., Tensor], x: Tensor, **inputs) -> Tensor:
            run, cache = skipped(), host.caches[host.active_index]
            cache.computed.clear()
            y = inner(x, **inputs)
            run.anything |= self._record(host, trace, cache, len(x))
            trace.set_memory(self.title, sum(cache.nbytes for cache in host.caches))
            if host.step.index == host.step.count - 1 and not self.inactive_reason(run_spec(host)):
                self._report(trace, run.anything)
            return y

        with host.wrap_denoiser(denoise), host.cached(partial(self.new_cache, host)):
            yield

    def check(self, spec: RunSpec) -> None:
        """Raise AccelError where the cache cannot run on the model."""
        self.check_model(spec.family, spec.model)

    def check_model(self, family: Family, model: nn.Module) -> None:
        """Raise AccelError where the cache cannot run on a model."""
        if any(block._compiled_call_impl for blocks in family.block_lists(model).values() for block in blocks):
            self.refuse("what it skips cannot be counted inside compiled blocks", model)
        if self.skips_blocks and not family.is_stack(model):
            self.refuse("the model changes hidden states between its blocks", model)

    def check_run(self, host: Host) -> None:
        """Raise AccelError where the cache cannot run in a pipeline, or would mix up its branches."""

    def refuse(self, reason: str, model: nn.Module | None = None) -> None:
        """Raise AccelError."""
        raise AccelError(f"{self.title} cannot run {f'on {type(model).__name__}' if model else 'here'}: {reason}")

    def _begin(self, host: Host, trace: Trace) -> Skipped:
        self.check_run(host)
        spec = run_spec(host)
        if reason := self.inactive_reason(spec):
            trace.add_message(reason)
        report_estimate(self, spec, trace)
        return Skipped()

    def _record(self, host: Host, trace: Trace, cache: ForeignCache, batch: int) -> bool:
        """Record what a call of a batch skipped; returns whether it skipped anything.

        Skipped self-attentions are events of their own. What else was skipped lowers the share of the whole call.
        """
        full, step, attentions = trace.flops[DENOISER], host.step, host.attentions[host.active_index]
        share = cache.computed.get(DENOISER, batch) / batch  # FasterCache computes one half of a guided batch
        skipped = [name for name in cache.modules if name not in cache.computed and name != DENOISER]
        reused = [name for name in skipped if name in attentions]
        inside = [name for name in attentions if any(name.startswith(f"{module}.") for module in skipped)]
        work = share * (full - sum(trace.flops.get(name, 0) for name in skipped))
        for name in reused:
            trace.record(step, name, self.action, 0.0)
        work += sum(trace.flops[name] for name in reused)
        if skipped or share < 1:
            action = self.action if inside else "rebuild" if share < 1 else "compute"
            trace.record(step, DENOISER, action, work / full)
            trace.discard(step, inside)
        return bool(skipped) or share < 1

    def _report(self, trace: Trace, anything: bool) -> None:
        """Say at the end of a run if nothing was skipped; a later branch of the last step may still skip something."""
        text = f"{self.title} skipped nothing in this run: every step was computed in full"
        if not anything:
            trace.add_message(text)
        elif text in trace.messages:
            trace.messages.remove(text)
