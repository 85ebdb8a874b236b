"""The host: observes a stock diffusers pipeline and gives methods the step, and places to wrap, from outer to inner.

`wrap_denoiser`   a full transformer call             fn(inner, x, **inputs) -> velocity, in the shape of the latents
`wrap_blocks`     the stack of blocks inside it        fn(inner, hidden, *inputs) -> hidden (b, n, d)
`wrap_attention`  each video self-attention            fn(inner, layer) -> its output (b, n, d)
`wrap_qkv`        the softmax inside it                fn(inner, qkv, layer) -> its output (b, n, k, d)

Wrappers nest, the last added outermost; none replaces another. Modules are looked up once, at construction, and the
model is as it was found on exit. Built on diffusers' hooks and attention processors, so offloading, LoRA, attention
backends and compiled blocks keep working.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..errors import AccelError
from ..families import family_of
from .attention import QKV, intercept_attention
from .flops import count_flops
from .hooks import ForwardHook, reattach_after_offload, wrapped_forward
from .trace import DENOISER, Step, Trace

T = TypeVar("T")


class BlockStack(nn.ModuleList):
    """The model's own blocks under their own names; iterating over it yields one function that runs them all.

    The blocks themselves carry no hook, so compiled blocks stay as they were compiled.
    """

    def __init__(self, blocks: nn.ModuleList, run_stack: Callable):
        super().__init__(blocks)
        self._run_stack = run_stack

    def __iter__(self) -> Iterator[Callable]:
        return iter((self._run_stack,))


class Host:
    """A pipeline under observation.

    `step` is where its loop stands, `active_index` which of its `denoisers` runs, `latents` the input of that call.
    `exact_steps` are steps that later steps reuse; methods must compute them exactly.
    """

    def __init__(self, pipe, trace: Trace):
        self.pipe, self.trace, self.family = pipe, trace, family_of(pipe)
        self.denoisers = self.family.denoisers(pipe)
        if any(hasattr(model, "_orig_mod") for model in self.denoisers):
            raise AccelError(
                "a transformer that is compiled as a whole cannot be wrapped inside: compile its blocks, by "
                "pipe.transformer.compile_repeated_blocks()"
            )
        self.signatures = [inspect.signature(type(model).forward) for model in self.denoisers]
        self.attentions = [self.family.attentions(model) for model in self.denoisers]
        self.num_blocks = [len(self.family.blocks(model)) for model in self.denoisers]
        self.step: Step | None = None
        self.active_index = 0
        self.latents: Tensor | None = None
        self.run_id = 0
        self.exact_steps: set[int] = set()
        self._seen: set[tuple[int, str]] = set()  # (step, branch) pairs of this run
        self._tracker = CallTracker()
        self._denoiser_wrappers: list[Callable] = []
        self._block_wrappers: list[Callable] = []
        self._attention_wrappers: list[Callable] = []
        self._qkv_wrappers: list[Callable] = []

    @contextmanager
    def attached(self) -> Iterator[Host]:
        """Let the pipeline's transformer calls pass through the host for the time of the context."""
        hooks = lambda: enter_all(
            wrapped_forward(model, partial(self._denoise, i)) for i, model in enumerate(self.denoisers)
        )
        with reattach_after_offload(self.pipe, hooks):
            yield self

    def wrap_denoiser(self, fn: Callable) -> AbstractContextManager:
        """Call `fn(inner, x, **inputs)` for each transformer call; it returns the velocity in the shape of x."""
        return _registered(self._denoiser_wrappers, fn)

    def wrap_blocks(self, fn: Callable) -> AbstractContextManager:
        """Call `fn(inner, hidden, *inputs)` for the stack of blocks; it returns hidden states (b, n, d)."""
        return _registered(self._block_wrappers, fn, self._open_blocks)

    def wrap_attention(self, fn: Callable) -> AbstractContextManager:
        """Call `fn(inner, layer)` for each video self-attention; it returns the attention's output (b, n, d)."""
        return _registered(self._attention_wrappers, fn, self._open_attentions)

    def wrap_qkv(self, fn: Callable) -> AbstractContextManager:
        """Call `fn(inner, qkv, layer)` for the softmax of each video self-attention; it returns (b, n, k, d).

        `qkv` is a `QKV`; `inner(qkv)` takes any number of queries and keys. A result of `qkv.restore` may be returned
        although it is shorter (b, m, k, d): the attention restores it after its output projection.
        """
        return _registered(self._qkv_wrappers, fn, self._open_qkv)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid (f, h, w) of the current call."""
        return self.family.grid(self.denoisers[self.active_index], self.latents)

    def per_run(self, factory: Callable[[], T]) -> Callable[[], T]:
        """A getter of state that the factory makes anew for each run of the pipeline."""
        runs: dict[int, T] = {}

        def get() -> T:
            if self.run_id not in runs:
                runs.clear()
                runs[self.run_id] = factory()
            return runs[self.run_id]

        return get

    def _open_blocks(self) -> AbstractContextManager:
        return enter_all(self._as_block_stack(model) for model in self.denoisers)

    @contextmanager
    def _as_block_stack(self, model: nn.Module) -> Iterator[None]:
        """Replace a model's list of blocks by a `BlockStack` that runs through the block wrappers."""
        family, blocks = self.family, self.family.blocks(model)
        if type(model).__name__ not in family.STACKABLE:
            raise AccelError(f"{type(model).__name__} changes hidden states between its blocks: they are not one stack")

        def run_blocks(hidden: Tensor, *inputs, **named) -> Tensor:
            for block in blocks:
                hidden = block(hidden, *inputs, **named)
            return hidden

        run_stack = lambda *inputs, **named: compose(run_blocks, self._block_wrappers)(*inputs, **named)
        setattr(model, family.BLOCKS_ATTR, BlockStack(blocks, run_stack))
        try:
            yield
        finally:
            setattr(model, family.BLOCKS_ATTR, blocks)

    def _open_attentions(self) -> AbstractContextManager:
        return enter_all(
            intercept_attention(attn, self.family, output_wrapper=partial(self._run_attention, layer))
            for layer, attn in self._layers()
        )

    def _open_qkv(self) -> AbstractContextManager:
        return enter_all(
            intercept_attention(attn, self.family, core_wrapper=partial(self._run_core, layer))
            for layer, attn in self._layers()
        )

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        return (item for attentions in self.attentions for item in attentions.items())

    def _denoise(self, index: int, hook: ForwardHook, *args, **kwargs):
        """The forward of transformer `index`: track the call, run it through the wrappers, and time it."""
        inputs = self.signatures[index].bind(None, *args, **kwargs).arguments
        del inputs["self"]
        return_dict, x = inputs.pop("return_dict", True), inputs.pop("hidden_states")
        began = synchronized_time(x.device)
        self._track_call(index, hook, x, inputs)
        step = self.step

        def call(x: Tensor, **inputs) -> Tensor:
            for layer in (DENOISER, *self.attentions[index]):
                self.trace.record(step, layer, "compute")
            return hook.original(hidden_states=x, **inputs, return_dict=False)[0]

        y = compose(call, self._denoiser_wrappers)(x, **inputs)
        spent = 1000 * (synchronized_time(x.device) - began)
        self.trace.milliseconds[step.index] = self.trace.milliseconds.get(step.index, 0.0) + spent
        return Transformer2DModelOutput(sample=y) if return_dict else (y,)

    def _track_call(self, index: int, hook: ForwardHook, x: Tensor, inputs: dict[str, Any]) -> None:
        """Find out which step and branch this call is, and whether it begins a new run."""
        context = hook.states._context
        scheduler = self.pipe.scheduler
        if context is None or context.step_index is None:
            step_index, branch = self._tracker.locate(inputs["timestep"], inputs["encoder_hidden_states"])
            branch = context.name if context else branch
            scheduled = len(scheduler.timesteps)
            count = getattr(self.pipe, "num_timesteps", scheduled)
            skipped = scheduled - count  # video to video starts later in the schedule
        else:
            step_index, branch, count, skipped = context.step_index, context.name, context.num_inference_steps, 0
        begins = self.step is None or step_index < self.step.index or (step_index, branch) in self._seen
        if begins:
            self.run_id += 1
            self.trace.begin()
            self._seen.clear()
            self.exact_steps.clear()
            self.trace.started = time.perf_counter()
        self._seen.add((step_index, branch))
        sigma, sigma_next = map(float, scheduler.sigmas[skipped + step_index : skipped + step_index + 2])
        self.step = Step(step_index, count, sigma, sigma_next, branch)
        if begins or index != self.active_index:  # shapes do not change within a run
            self.trace.flops = count_flops(self.denoisers[index], x, inputs)
        self.active_index, self.latents = index, x
        self.trace.sigmas[step_index] = self.step.sigma

    def _run_attention(self, layer: str, call: Callable) -> Tensor:
        for fn in self._attention_wrappers:
            call = partial(fn, call, layer)
        return call()

    def _run_core(self, layer: str, inner: Callable, qkv: QKV) -> Tensor:
        for fn in self._qkv_wrappers:
            inner = partial(fn, inner, layer=layer)
        return inner(qkv)


class CallTracker:
    """Finds step and branch where the pipeline does not name them: a new timestep is a step, a text is a branch."""

    def __init__(self):
        self.index, self.time = -1, float("-inf")
        self.texts: list[Tensor] = []  # all pipelines call cond first

    def locate(self, timestep: Tensor, text: Tensor) -> tuple[int, str]:
        """(step index, branch) of a call; a higher timestep or a third text embedding begins another run."""
        time = float(timestep.max())  # with one timestep per token, those of a given first frame are 0
        known = any(seen is text for seen in self.texts)
        if time > self.time or (not known and len(self.texts) == 2):
            self.index, self.time, self.texts = 0, time, []
        elif time < self.time:
            self.index, self.time = self.index + 1, time
        if not any(seen is text for seen in self.texts):
            self.texts.append(text)
        return self.index, "cond" if text is self.texts[0] else "uncond"


def compose(call: Callable, wrappers: list[Callable]) -> Callable:
    """The call inside all wrappers, the last one outermost."""
    for fn in wrappers:
        call = partial(fn, call)
    return call


@contextmanager
def enter_all(contexts: Iterable[AbstractContextManager]) -> Iterator[None]:
    """Enter all contexts in their order, and leave them in reverse."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def _registered(wrappers: list[Callable], fn: Callable, opener: Callable = nullcontext) -> Iterator[None]:
    """Add a wrapper to its list; `opener` installs the hooks with the first wrapper and removes them with the last."""
    with nullcontext() if wrappers else opener():
        wrappers.append(fn)
        try:
            yield
        finally:
            wrappers.remove(fn)


def synchronized_time(device: torch.device) -> float:
    """A clock reading in seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
