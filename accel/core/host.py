"""The host: wraps a stock diffusers pipeline and gives methods the step, and places to wrap, from outer to inner.

`wrap_denoiser`  a whole transformer call            fn(inner, x, **inputs) -> velocity (b, c, f, h, w)
`wrap_blocks`    the stack of blocks inside it        fn(inner, hidden, *inputs) -> hidden (b, n, d)
`wrap_attention` each video self-attention's output   fn(inner, site) -> hidden (b, n, d)
`wrap_heads`     what lies inside it                   fn(inner, heads, site) -> heads (b, m, h, d)

Wrappers nest, the last added outermost; none replaces another. Handles are taken once, at construction, and the
model is on exit as it was found. Built on diffusers' hooks and attention processors, so offload, LoRA, attention
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

from ..families import family_of
from .attention import QKV, intercept_attention
from .flops import count_flops
from .hooks import ForwardHook, reattach_after_offload, wrapped_forward
from .trace import DENOISER, Step, Trace

T = TypeVar("T")


class BlockStack(nn.ModuleList):
    """The same blocks under the same names, of which whoever goes through them sees one function.

    No hook is on the blocks themselves, so compiled ones stay as they were compiled.
    """

    def __init__(self, blocks: nn.ModuleList, stack: Callable):
        super().__init__(blocks)
        self._stack = stack

    def __iter__(self) -> Iterator[Callable]:
        return iter((self._stack,))


class Host:
    """A pipeline under observation. `step` is where its loop stands, `model` which of its transformers runs."""

    def __init__(self, pipe, trace: Trace):
        self.pipe, self.trace, self.family = pipe, trace, family_of(pipe)
        self.denoisers = self.family.denoisers(pipe)
        if any(hasattr(model, "_orig_mod") for model in self.denoisers):
            raise ValueError(
                "a transformer that is compiled as a whole has no places to wrap: compile its blocks, by "
                "pipe.transformer.compile_repeated_blocks()"
            )
        self.signatures = [inspect.signature(type(model).forward) for model in self.denoisers]
        self.attentions = [self.family.attentions(model) for model in self.denoisers]
        self.num_blocks = [len(self.family.blocks(model)) for model in self.denoisers]
        self.step: Step | None = None
        self.active_index = 0
        self.latents: Tensor | None = None  # the input of the call that runs, (b, c, f, h, w)
        self.run_id = 0
        self.exact_steps: set[int] = set()  # steps of this run whose outputs others are built from: to be exact in
        self._seen: set[tuple[int, str]] = set()
        self._loose = CallTracker()
        self._denoiser: list[Callable] = []
        self._blocks: list[Callable] = []
        self._attention: list[Callable] = []
        self._qkv: list[Callable] = []

    @contextmanager
    def attached(self) -> Iterator[Host]:
        """Inside, the pipeline's calls pass through the host."""
        hooks = lambda: enter_all(
            wrapped_forward(model, partial(self._denoise, i)) for i, model in enumerate(self.denoisers)
        )
        with reattach_after_offload(self.pipe, hooks):
            yield self

    def wrap_denoiser(self, fn: Callable) -> AbstractContextManager:
        """Let `fn(inner, x, **inputs)` stand around each transformer call; returns (b, c, f, h, w)."""
        return _registered(self._denoiser, fn)

    def wrap_blocks(self, fn: Callable) -> AbstractContextManager:
        """Let `fn(inner, hidden, *inputs)` stand around the whole stack of blocks; returns (b, n, d)."""
        return _registered(self._blocks, fn, self._open_blocks)

    def wrap_attention(self, fn: Callable) -> AbstractContextManager:
        """Let `fn(inner, site)` stand around each video self-attention; returns its output (b, n, d)."""
        return _registered(self._attention, fn, self._open_attentions)

    def wrap_qkv(self, fn: Callable) -> AbstractContextManager:
        """Let `fn(inner, heads, site)` stand around each video self-attention's core; returns (b, n, h, d).

        `heads` are a `Heads`, after norm and rotary embedding; `inner(heads)` takes any lengths. What `heads.restore`
        gave may be returned though it is shorter (b, m, h, d): the attention restores it after its projection.
        """
        return _registered(self._qkv, fn, self._open_qkv)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens (f, h, w) of the call that runs."""
        return self.family.grid(self.denoisers[self.active_index], self.latents)

    def _open_blocks(self) -> AbstractContextManager:
        return enter_all(self._as_one(i) for i in range(len(self.denoisers)))

    @contextmanager
    def _as_one(self, index: int) -> Iterator[None]:
        """Let a model find one block where its blocks are: the wrapped stack of them."""
        model, blocks = self.denoisers[index], self.family.blocks(self.denoisers[index])
        if type(model).__name__ not in self.family.STACKABLE:
            raise ValueError(
                f"{type(model).__name__} adds to what its blocks give between them: they are not one stack"
            )

        def stack(hidden: Tensor, *inputs, **named) -> Tensor:
            for block in blocks:
                hidden = block(hidden, *inputs, **named)
            return hidden

        whole = lambda *inputs, **named: compose(stack, self._blocks)(*inputs, **named)
        setattr(model, self.family.BLOCKS_ATTR, BlockStack(blocks, whole))
        try:
            yield
        finally:
            setattr(model, self.family.BLOCKS_ATTR, blocks)

    def _open_attentions(self) -> AbstractContextManager:
        return enter_all(
            intercept_attention(m, self.family, output_wrapper=partial(self._attend, layer))
            for layer, m in self._layers()
        )

    def _open_qkv(self) -> AbstractContextManager:
        return enter_all(
            intercept_attention(m, self.family, core_wrapper=partial(self._core, layer)) for layer, m in self._layers()
        )

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        return (item for attentions in self.attentions for item in attentions.items())

    def per_run(self, factory: Callable[[], T]) -> Callable[[], T]:
        """A getter of state that is made anew for each run of the pipeline."""
        runs: dict[int, T] = {}

        def get() -> T:
            if self.run_id not in runs:
                runs.clear()
                runs[self.run_id] = factory()
            return runs[self.run_id]

        return get

    def _denoise(self, model: int, hook: ForwardHook, *args, **kwargs):
        inputs = self.signatures[model].bind(None, *args, **kwargs).arguments
        del inputs["self"]
        return_dict, x = inputs.pop("return_dict", True), inputs.pop("hidden_states")
        began = synchronized_time(x.device)
        self._track_call(model, hook, x, inputs)
        step = self.step

        def call(x: Tensor, **inputs) -> Tensor:
            for layer in (DENOISER, *self.attentions[model]):
                self.trace.record(step, layer, "compute")
            return hook.original(hidden_states=x, **inputs, return_dict=False)[0]

        y = compose(call, self._denoiser)(x, **inputs)
        spent = 1000 * (synchronized_time(x.device) - began)
        self.trace.milliseconds[step.index] = self.trace.milliseconds.get(step.index, 0.0) + spent
        return Transformer2DModelOutput(sample=y) if return_dict else (y,)

    def _track_call(self, model: int, hook: ForwardHook, x: Tensor, inputs: dict[str, Any]) -> None:
        """Find out which step and branch this call is, and whether it opens a new run."""
        context = hook.states._context
        scheduler = self.pipe.scheduler
        if context is None or context.step_index is None:
            index, branch = self._loose.place(inputs["timestep"], inputs["encoder_hidden_states"])
            branch = context.name if context else branch
            whole = len(scheduler.timesteps)
            count = getattr(self.pipe, "num_timesteps", whole)
            skipped = whole - count  # a video to begin with takes the place of the first steps
        else:
            index, branch, count, skipped = context.step_index, context.name, context.num_inference_steps, 0
        opens = self.step is None or index < self.step.index or (index, branch) in self._seen
        if opens:
            self.run_id += 1
            self.trace.begin()
            self._seen.clear()
            self.exact_steps.clear()
            self.trace.started = time.perf_counter()
        self._seen.add((index, branch))
        sigma, sigma_next = map(float, scheduler.sigmas[skipped + index : skipped + index + 2])
        self.step = Step(index, count, sigma, sigma_next, branch)
        if opens or model != self.active_index:  # shapes do not change within a run
            self.trace.flops = count_flops(self.denoisers[model], x, inputs)
        self.active_index, self.latents = model, x
        self.trace.sigmas[index] = self.step.sigma

    def _attend(self, layer: str, call: Callable) -> Tensor:
        for fn in self._attention:
            call = partial(fn, call, layer)
        return call()

    def _core(self, layer: str, inner: Callable, qkv: QKV) -> Tensor:
        for fn in self._qkv:
            inner = partial(fn, inner, layer=layer)
        return inner(qkv)


class CallTracker:
    """Step and branch where the pipeline does not tell: a step is a new timestep, a branch a text embedding."""

    def __init__(self):
        self.index, self.time = -1, float("-inf")
        self.texts: list[Tensor] = []  # cond first, as all pipelines call it

    def place(self, timestep: Tensor, text: Tensor) -> tuple[int, str]:
        """(step index, branch) of a call; a higher timestep or a third text opens another run."""
        now = float(timestep.max())  # of tokens that have one each, a given first frame's is 0
        known = any(seen is text for seen in self.texts)
        if now > self.time or (not known and len(self.texts) == 2):
            self.index, self.time, self.texts = 0, now, []
        elif now < self.time:
            self.index, self.time = self.index + 1, now
        if not any(seen is text for seen in self.texts):
            self.texts.append(text)
        return self.index, "cond" if text is self.texts[0] else "uncond"


def compose(call: Callable, wrappers: list[Callable]) -> Callable:
    for fn in wrappers:
        call = partial(fn, call)
    return call


@contextmanager
def enter_all(contexts: Iterable[AbstractContextManager]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def _registered(wrappers: list[Callable], fn: Callable, place: Callable = nullcontext) -> Iterator[None]:
    """The wrapper in its list; the first to come opens the place and, as contexts nest, is the last to leave it."""
    with nullcontext() if wrappers else place():
        wrappers.append(fn)
        try:
            yield
        finally:
            wrappers.remove(fn)


def synchronized_time(device: torch.device) -> float:
    """Seconds, with the device's queue drained first."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
