"""The host: observes a stock diffusers pipeline and gives methods the step, and places to wrap, from outer to inner.

`wrap_denoiser`   a full transformer call             fn(inner, x, **inputs) -> velocity (b, c, f, h, w)
`wrap_blocks`     the stack of blocks inside it        fn(inner, hidden, *inputs) -> hidden (b, n, d)
`wrap_attention`  each video self-attention            fn(inner, layer) -> its output, of any shape (b, ...)
`wrap_qkv`        the softmax inside it                fn(inner, qkv, layer) -> its output (b, n, k, d)

Wrappers nest, the last added outermost; none replaces another. Where a pipeline computes both branches of guidance in
one batch, the batch is split, so that each call is of one branch. At the start of every run the host looks at what it
stands on, and takes its places again where somebody has changed the model; on exit the model is as it was found. Built
on diffusers' hooks and attention processors, so offloading, LoRA, attention backends and compiled blocks keep working.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from diffusers.hooks.hooks import CacheContext
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..errors import AccelError
from ..families import family_of
from .attention import QKV, InterceptedProcessor
from .blocks import StackedBlocks
from .calls import compose, halves, running_call, synchronized_time
from .denoising_loop import CallTracker, is_flow, noise_levels
from .flops import count_flops
from .foreign import ForeignCache, check_foreign, foreign_cache
from .hooks import ForwardHook, HookedForward, patched_method
from .trace import DENOISER, Step, Trace

T = TypeVar("T")
BATCHED = "cond_uncond"  # the name that diffusers gives to the cache context of a batch of both branches


class Place(Protocol):
    """Something in a model that the host replaces for a time."""

    is_held: bool

    def take(self) -> None: ...
    def leave(self) -> None: ...


class Host:
    """A pipeline under observation.

    `step` is where its loop stands, `active_index` which of its `denoisers` runs, `latents` the input of that call
    (`signal` times the clean video, plus sigma times noise) and `grid` its token grid (f, h, w), `text_tokens` those
    that joint attention has beside it. `exact_steps` are steps that later steps reuse; methods must compute them
    exactly.
    """

    def __init__(self, pipe, trace: Trace, splits_batches: bool = True, has_methods: bool = True):
        """`splits_batches`: methods see the branches of guidance one by one, also where a call has both.

        Without methods, a cache of others is not refused.
        """
        self.has_methods = has_methods
        self.pipe, self.trace, self.family, self.splits_batches = pipe, trace, family_of(pipe), splits_batches
        self.step: Step | None = None
        self.signal = 0.0
        self.active_index = 0
        self.latents: Tensor | None = None
        self.grid, self.text_tokens = (0, 0, 0), 0
        self.is_guided = self.is_run_guided = False  # in this call, and in any step of the run
        self.run_id = 0
        self.text_id = 0  # changes with the run, and with a text in mid-run
        self.exact_steps: set[int] = set()
        self._tracker = CallTracker()
        self._levels: list[float] = []  # sigma of each timestep
        self._by_pipeline = True  # the present call is the pipeline's, not of a loop of the user's own
        self._is_counting = False  # a call that only counts FLOPs is under way
        self._in_call = False  # a transformer call is under way that the host knows of
        self._returns_tensor = False  # without return_dict, as Kandinsky 5; others give a tuple
        self.cache_context: CacheContext | None = None  # of the pipeline's current call
        self.caches: list[ForeignCache] = []  # those that a peer puts on the denoisers
        self._new_cache: Callable[[nn.Module], ForeignCache] | None = None
        self._layouts: dict[tuple, list[torch.Size]] = {}  # what an attention returns, by transformer, layer and branch
        self._places: list[Place] = []
        self._kept_states: list[dict] = []  # what methods hold for a run or a text
        self._denoiser_wrappers: list[Callable] = []
        self._block_wrappers: list[Callable] = []
        self._attention_wrappers: list[Callable] = []
        self._qkv_wrappers: list[Callable] = []
        self._look()

    def _look(self) -> None:
        """Look up the pipeline's transformers and what is in them; nothing changes if one is refused."""
        denoisers = self.family.denoisers(self.pipe)
        if any(hasattr(model, "_orig_mod") or model._compiled_call_impl for model in denoisers):
            raise AccelError(
                "a transformer that is compiled as a whole cannot be wrapped inside: compile its blocks, by "
                "pipe.transformer.compile_repeated_blocks()"
            )
        if self.has_methods and not self.caches:
            check_foreign(denoisers)
        self.denoisers = denoisers
        self.signatures = [inspect.signature(type(model).forward) for model in self.denoisers]
        self.attentions = [self.family.attentions(model) for model in self.denoisers]

    @contextmanager
    def attached(self) -> Iterator[Host]:
        """Let the pipeline's calls pass through the host, and all that was registered before, inside the context."""
        check, free = self.pipe.check_inputs, self.pipe.maybe_free_model_hooks
        with patched_method(self.pipe, "check_inputs", partial(self._renew, check)):
            with patched_method(self.pipe, "maybe_free_model_hooks", partial(self._free, free)):
                self._take()
                try:
                    yield self
                finally:
                    self._leave()

    def wrap_denoiser(self, fn: Callable) -> AbstractContextManager:
        """Call `fn(inner, x, **inputs)` for each transformer call; it returns the velocity (b, c, f, h, w)."""
        return self._registered(self._denoiser_wrappers, fn)

    def wrap_blocks(self, fn: Callable) -> AbstractContextManager:
        """Call `fn(inner, hidden, *inputs)` for the stack of blocks; it returns hidden states (b, n, d)."""
        return self._registered(self._block_wrappers, fn)

    def wrap_attention(self, fn: Callable) -> AbstractContextManager:
        """Call `fn(inner, layer)` for each video self-attention; both return its output, one tensor (b, ...)."""
        return self._registered(self._attention_wrappers, fn)

    def wrap_qkv(self, fn: Callable) -> AbstractContextManager:
        """Call `fn(inner, qkv, layer)` for the softmax of each video self-attention; it returns (b, n, k, d).

        `qkv` is a `QKV` of the video's tokens; `inner(qkv)` takes any number of queries and keys. A result of
        `qkv.restore` may be returned although it is shorter (b, m, k, d): the attention restores it after its output
        projection.
        """
        return self._registered(self._qkv_wrappers, fn)

    @contextmanager
    def cached(self, new_cache: Callable[[nn.Module], ForeignCache]) -> Iterator[None]:
        """Put a cache of others on each denoiser, inside all wrappers; it starts afresh with each run."""
        self._new_cache = new_cache
        try:
            yield
        finally:
            self._new_cache = None

    def per_run(self, factory: Callable[[], T]) -> Callable[[], T]:
        """A getter of state that the factory makes anew for each run of the pipeline."""
        return self._kept(factory, lambda: self.run_id)

    def per_text_and_model(self, factory: Callable[[], T]) -> Callable[[], T]:
        """A getter of state that depends on what was computed: made anew for each run, and within one after a callback
        has changed a text, or another transformer has taken over (Wan 2.2).
        """
        return self._kept(factory, lambda: (self.text_id, self.active_index))

    def _kept(self, factory: Callable[[], T], key: Callable[[], Hashable]) -> Callable[[], T]:
        kept: dict[Hashable, T] = {}
        self._kept_states.append(kept)

        def get() -> T:
            if key() not in kept:
                kept.clear()
                kept[key()] = factory()
            return kept[key()]

        return get

    @contextmanager
    def _registered(self, wrappers: list[Callable], fn: Callable) -> Iterator[None]:
        """Add a wrapper to its list; the host is later put where there are wrappers for it."""
        wrappers.append(fn)
        try:
            yield
        finally:
            wrappers.remove(fn)

    # Places in the model

    def _take(self) -> None:
        """Take all places that the registered wrappers need; none of them if one cannot be had."""
        try:
            for place in self._needed_places():
                place.take()
                self._places.append(place)
        except BaseException:
            self._leave()
            raise

    def _needed_places(self) -> Iterator[Place]:
        self.caches = [self._new_cache(model) for model in self.denoisers] if self._new_cache else []
        for i, model in enumerate(self.denoisers):
            if self.caches:
                yield self.caches[i]
            if self._attention_wrappers or self._qkv_wrappers:
                for layer, attn in self.attentions[i].items():
                    core = partial(self._run_core, layer) if self._qkv_wrappers else None
                    output = partial(self._run_attention, layer) if self._attention_wrappers else None
                    yield InterceptedProcessor.of(attn, self.family, self._num_video_tokens, core, output)
            if self._block_wrappers:
                yield StackedBlocks(model, self.family, self._run_blocks, self._wraps_blocks)
            yield HookedForward(model, partial(self._denoise, i))

    def _wraps_blocks(self) -> bool:
        """Whether what now goes over the blocks is a call of the model: the host's, or one past it, to be refused."""
        return self._in_call or not all(place.is_held for place in self._places)

    def _leave(self) -> None:
        while self._places:
            self._places.pop().leave()

    def _renew(self, check_inputs: Callable, *args, **named) -> Any:
        """Before a run: look at the pipeline anew, and take the places again if somebody has changed one.

        None are held after a refusal, for the next run may be one that is possible.
        """
        for kept in self._kept_states:  # a cancelled run leaves its caches, and texts are encoded first
            kept.clear()
        before = self.denoisers
        self._look()
        same = len(before) == len(self.denoisers) and all(a is b for a, b in zip(before, self.denoisers))
        if not same or not self._places or not all(place.is_held for place in self._places):
            self._leave()
            self._take()
        return check_inputs(*args, **named)

    def _free(self, free: Callable[[], None]) -> None:
        """After a run, diffusers removes all hooks from offloaded models, and puts its own on again."""
        if not getattr(self.pipe, "_all_hooks", None):
            return free()
        self._leave()
        try:
            free()
        finally:
            self._take()

    # Calls

    def _denoise(self, index: int, hook: ForwardHook, *args, **kwargs):
        """The forward of transformer `index`: one call through the wrappers, or one for each half of a guided batch."""
        if self._is_counting:
            return hook.original(*args, **kwargs)
        inputs = self.signatures[index].bind(None, *args, **kwargs).arguments
        del inputs["self"]
        return_dict, x = inputs.pop("return_dict", True), inputs.pop("hidden_states")
        pipe, call = running_call(self.pipe)
        self._by_pipeline = bool(call)
        # A loop of the user's own tells nothing: its branches come one by one.
        self.is_guided = self.family.is_guided(pipe, call) if call else not self.family.batches_guidance
        self.cache_context = hook.context
        name = self.cache_context.name if self.cache_context and self.cache_context.name != BATCHED else None
        run = partial(self._run, index, hook, pipe)
        if self.family.batches_guidance and self.is_guided and self.splits_batches:
            uncond, cond = halves(x, inputs)
            y = torch.cat([run("cond", *cond), run("uncond", *uncond)][::-1])
        else:
            y = run(name or ("cond" if self.family.batches_guidance else None), x, inputs)
        return Transformer2DModelOutput(sample=y) if return_dict else y if self._returns_tensor else (y,)

    def _run(self, index: int, hook: ForwardHook, pipe, name: str | None, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        """One call of one branch: track it, run it through the wrappers, and time it."""
        self._track(index, pipe, name, x, inputs)
        began = synchronized_time(x.device)
        step, family, grid = self.step, self.family, self.grid

        def call(x: Tensor, **inputs) -> Tensor:
            for layer in (DENOISER, *self.attentions[index]):
                self.trace.record(step, layer, "compute")
            y = hook.original(hidden_states=x, **inputs, return_dict=False)
            self._returns_tensor = isinstance(y, Tensor)
            return family.to_video(y if self._returns_tensor else y[0], grid)

        self._in_call = True
        try:
            y = family.from_video(compose(call, self._denoiser_wrappers)(x, **inputs))
        finally:
            self._in_call = False
        spent = 1000 * (synchronized_time(x.device) - began)
        self.trace.milliseconds[step.index] = self.trace.milliseconds.get(step.index, 0.0) + spent
        return y

    def _track(self, index: int, pipe, name: str | None, x: Tensor, inputs: dict[str, Any]) -> None:
        """Find out which step and branch this call is, and whether it begins a new run."""
        time, text = inputs["timestep"], inputs["encoder_hidden_states"]
        at = self._tracker.locate(pipe, time, text, name, self.is_guided, self._by_pipeline)
        if at.begins:
            self._levels = noise_levels(pipe.scheduler)
            _, call = running_call(self.pipe)
            self.is_run_guided = self.family.is_run_guided(pipe, call) if call else self.is_guided
            self.run_id, self.text_id = self.run_id + 1, self.text_id + 1
            self.trace.begin()
            self.exact_steps.clear()
            self._reset_caches()
        if at.has_new_text:
            self.text_id += 1
            self.trace.add_message(f"the text changed at step {at.index + 1}: what depends on it was computed anew")
        self.step = Step(at.index, at.count, *self._levels[at.position : at.position + 2], at.branch)
        sigma = self.step.sigma
        self.signal = 1 - sigma if is_flow(pipe.scheduler) else (1 - sigma**2) ** 0.5
        self.grid = self.family.grid(self.denoisers[index], x, inputs)
        self.text_tokens = self.family.text_tokens(inputs)
        if at.begins or index != self.active_index:  # shapes do not change within a run
            self.trace.flops = self._flops(index, x, inputs)
        if at.begins:
            self.trace.started = synchronized_time(x.device)  # counting FLOPs is no part of the run
        self.active_index, self.latents = index, x
        self.trace.sigmas[at.index] = self.step.sigma

    def _flops(self, index: int, x: Tensor, inputs: dict[str, Any]) -> dict[str, int]:
        """FLOPs of one call; none beside a cache of others, which would take a counting call for a step."""
        if not self.caches and (cache := foreign_cache(self.denoisers)):
            self.trace.add_message(f"{cache} is on: what it skips is not counted here")
            return {}
        return count_flops(self.denoisers[index], x, inputs, partial(self._count, index, x, inputs))

    def _count(self, index: int, x: Tensor, inputs: dict[str, Any]) -> None:
        """A call of the transformer past all wrappers; caches, which take it for a step, forget it."""
        self._is_counting = True
        try:
            self.denoisers[index](hidden_states=x, **inputs)
        finally:
            self._is_counting = False
            self._reset_caches()

    def _reset_caches(self) -> None:
        for cache in self.caches:
            cache.reset(self.cache_context)

    def _num_video_tokens(self) -> int:
        f, h, w = self.grid
        return f * h * w

    def check_denoiser(self, model: nn.Module, what: str) -> None:
        """Raise AccelError if another transformer runs than the one that something was loaded for."""
        if self.denoisers[self.active_index] is not model:
            raise AccelError(f"{what} belongs to the transformer that the pipeline had: put that back, or apply anew")

    def _is_plain(self) -> bool:
        """Whether what runs is none of the host's calls: it counts FLOPs, or the user calls a part of the model.

        Raises AccelError if the transformer runs past the host.
        """
        if self._in_call and not self._is_counting:
            return False
        if not self._is_counting and not all(place.is_held for place in self._places):
            raise AccelError(
                "another pipeline with this transformer has taken accel's hook off it, when it offloaded the model: "
                "run one of them inside accel.apply"
            )
        return True

    def _run_blocks(self, stack: Callable, hidden: Tensor, *inputs, **named) -> Tensor:
        return compose(stack, [] if self._is_plain() else self._block_wrappers)(hidden, *inputs, **named)

    def _run_attention(self, layer: str, call: Callable) -> Tensor | tuple[Tensor, ...]:
        """An attention through the wrappers, which see one tensor: in joint attention, video and text side by side."""
        if self._is_plain():
            return call()
        key = self.active_index, layer, self.step.branch

        def joined() -> Tensor:
            out = call()
            if isinstance(out, Tensor):
                return out
            self._layouts[key] = [part.shape for part in out]
            return torch.cat([part.flatten(1) for part in out], 1)

        run = joined
        for fn in self._attention_wrappers:
            run = partial(fn, run, layer)
        out = run()
        if not self.family.is_joint:
            return out
        shapes = self._layouts[key]
        parts = out.split([shape[1:].numel() for shape in shapes], 1)
        return tuple(part.unflatten(1, shape[1:]) for part, shape in zip(parts, shapes))

    def _run_core(self, layer: str, inner: Callable, qkv: QKV) -> Tensor:
        if self._is_plain():
            return inner(qkv)
        for fn in self._qkv_wrappers:
            inner = partial(fn, inner, layer=layer)
        return inner(qkv)
