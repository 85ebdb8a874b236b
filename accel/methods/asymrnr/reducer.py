"""One run of AsymRnR: reduces the tokens of the attention cores, restores the outputs and corrects their error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.attention import QKV
from ...core.host import Host
from ...core.trace import DENOISER, Action, Timer
from ...ops.token_matching import Reduction
from ...students.euler_scheduler import is_student_run
from ..base import model_path, report_estimate, run_spec
from .backends import check_backends
from .correction import DEPTH, ResidualCache
from .plan_cache import PlanCache
from .schedule import RateSchedule

if TYPE_CHECKING:
    from .asymrnr import AsymRnR
    from .correction import Reductions

MIN_CORE_SHARE = 0.15  # if the attention cores are less of the model's work, reduction saves too little


class Reducer:
    """The state of one run, and what it does at each attention core."""

    def __init__(self, config: AsymRnR, host: Host):
        """Decide whether to reduce at all. Raises AccelError if the profile or the rates are of another model."""
        self.config, self.host = config, host
        spec, trace = run_spec(host), host.trace
        layers = list(host.attentions[host.active_index])
        interval = config.steps_between(spec.count, is_student_run(host.pipe))
        self.interval = interval
        self.plans = PlanCache(config.cell_shape, config.matching, config.metric, config.heads == "shared")
        corrects = config.corrects(spec.count)
        self.residuals = ResidualCache(DEPTH[config.correction], interval) if corrects else None
        self.belongs_to = host.active_index, host.text_id  # transformer and text of plans and residuals
        self.timer = Timer()  # of matching, reducing and restoring
        self.full_attention_timer = Timer()  # of the reduced attentions that run besides full ones
        first, full_share = config.first_step(spec.count), 1 / interval if corrects else 0.0
        self.schedule = RateSchedule(config, host, self.plans, first, full_share)
        self.schedule.check_layers()
        check_backends(config, host.attentions[host.active_index].values(), host.latents.is_cuda)
        report_estimate(config, spec, trace)
        tokens, d = math.prod(spec.grid), spec.family.hidden_size(spec.model)
        share = 4 * len(spec.latents) * tokens**2 * d * len(layers) / trace.flops[DENOISER]
        reason = config.inactive_reason(spec)
        if share < MIN_CORE_SHARE:
            reason = f"AsymRnR is off: the attention cores are {share:.0%} of this model's work at this size"
        self.enabled = not reason
        if reason:
            trace.add_message(reason)
        elif config.schedule == "profiled":
            self.schedule.load_costs(model_path(host))
        trace.method_data["asymrnr"] = {
            "core_share": round(share, 4),
            "rates": {layer: [[0.0, 0.0]] * spec.count for layer in layers},
            "kept_tokens": {},
            "overhead_ms": None,
            "full_attention_ms": None,
        }

    def attend(self, inner: Callable[[QKV], Tensor], qkv: QKV, layer: str) -> Tensor:
        """A core's output (b, n, k, d), full or restored; (b, m, k, d) if it is restored after its projection."""
        y, step = self._attend(inner, qkv, layer), self.host.step
        if self.residuals and step.index == step.count - 1:  # they would take memory while the video is decoded
            self.residuals.end((layer, step.branch, qkv.sample), step, self.host.is_guided)
        return y

    def _attend(self, inner: Callable[[QKV], Tensor], qkv: QKV, layer: str) -> Tensor:
        host, trace, step = self.host, self.host.trace, self.host.step
        if not self.enabled or qkv.bias is not None:  # a bias is another method's, made for just these keys
            return inner(qkv)
        if qkv.shape[1] != math.prod(host.grid):
            trace.add_message(f"AsymRnR is off: {qkv.shape[1]} tokens are not the grid of {host.grid}")
            return inner(qkv)
        qkv.timer = self.timer
        key, exact = (layer, step.branch, qkv.sample), step.index in host.exact_steps
        if not self.schedule.is_active(qkv, layer) or not max(rates := self.schedule.rates(layer)):
            if self.residuals:  # the attention is computed, so it is not left out too long
                self.residuals.last_step[key] = step.index
            return inner(qkv)
        if exact and not self.residuals:
            return inner(qkv)
        self._renew()
        if self.residuals and not self.residuals.is_fresh(key, step, exact):
            if step.branch == "cond":
                trace.add_message(
                    "AsymRnR does not reduce attentions that are computed too seldom to correct: raise its interval"
                )
            trace.set_memory("asymrnr", self.nbytes)  # less, if residuals were dropped
            return inner(qkv)
        reductions, matching_flops = self._reductions(qkv, rates, layer)
        q, k = (len(r.keep[0]) if r else qkv.shape[1] for r in reductions)
        full, reduced = core_flops(qkv, qkv.shape[1], qkv.shape[1]), core_flops(qkv, q, k)
        if self.residuals and self.residuals.needs_refresh(key, step, reductions, exact):
            if step.index == step.count - 1:  # no later step needs the error
                return inner(qkv)
            y = self._full_and_reduced(inner, qkv, reductions, key)
            extra = reduced - qkv.saved_flops + matching_flops
            self._record("compute", qkv, layer, extra)
        else:
            residual = self.residuals.extrapolate(key, step) if self.residuals else None
            y = qkv.restore(inner(self._reduced(qkv, *reductions)), reductions[0], residual)
            extra = reduced - full - qkv.saved_flops + matching_flops
            self._record("reduce", qkv, layer, extra)
            trace.method_data["asymrnr"]["rates"][layer][step.index] = [*rates]
        trace.set_memory("asymrnr", self.nbytes)
        if host.latents.device.type != "cuda":  # there, this clock would see only the kernel launches
            trace.method_data["asymrnr"] |= self._milliseconds()
        return y

    @property
    def nbytes(self) -> int:
        """Bytes of plans, reductions and residuals."""
        return self.plans.nbytes + (self.residuals.nbytes if self.residuals else 0)

    def _renew(self) -> None:
        """Drop everything of another transformer (Wan 2.2 switches to its second one), or of another text."""
        now = self.host.active_index, self.host.text_id
        if self.belongs_to != now:
            self.plans.clear()
            if self.residuals:
                self.residuals.entries.clear()
            self.belongs_to = now

    def _milliseconds(self) -> dict[str, float]:
        timers = {"overhead_ms": self.timer, "full_attention_ms": self.full_attention_timer}
        return {name: round(1000 * timer.seconds, 2) for name, timer in timers.items()}

    def _full_and_reduced(self, inner: Callable, qkv: QKV, reductions: Reductions, key: tuple) -> Tensor:
        """The full attention, and besides it the reduced one, to measure the residual."""
        y = inner(QKV(qkv.query(), qkv.key(), qkv.value()))
        reduced_qkv = self._reduced(qkv, *reductions)
        with self.full_attention_timer:
            reduced = inner(reduced_qkv)
        self.residuals.add(key, self.host.step, reductions, qkv.residual(y, reduced, reductions[0]))
        return y

    def _reduced(self, qkv: QKV, queries: Reduction | None, keys: Reduction | None) -> QKV:
        mean = self.config.merge == "mean"
        q, k = qkv.query(queries, mean), qkv.key(keys, mean)
        bias = keys.bias(qkv.shape[0], qkv.shape[2]) if keys and self.config.bias else None
        return QKV(q, k, qkv.value(keys, self.config.merge != "replace"), bias)

    def _reductions(self, qkv: QKV, rates: tuple[float, float], layer: str) -> tuple[Reductions, int]:
        """The reductions of queries and of keys, and the FLOPs of matching."""
        queries, query_flops = self._reduction("query", qkv, rates[0], layer)
        if self.config.pairing == "one":
            return (queries, queries), query_flops
        keys, key_flops = self._reduction("kv", qkv, rates[1], layer)
        return (queries, keys), query_flops + key_flops

    def _reduction(self, feature: str, qkv: QKV, rate: float, layer: str) -> tuple[Reduction | None, int]:
        """The reduction of "query" or "kv" at a rate, None at rate 0, and the FLOPs of matching."""
        if not rate:
            return None, 0
        host = self.host
        part = self.plans.partition(feature, host.grid, host.latents.device)
        # A residual belongs to one reduction, so with correction one matching serves the whole run.
        window = 0 if self.residuals else (host.step.index - self.schedule.first) // self.interval
        key, flops = (layer, host.step.branch, qkv.sample, feature), 0
        if self.plans.needs_matching(key, window, qkv.shape):
            x = qkv.query() if feature == "query" else qkv.value()
            with self.timer:
                flops = self.plans.match(key, window, x, part)
        with self.timer:
            reduction = self.plans.at_rate(key, rate)
        if host.step.branch == "cond":
            self._record_kept_tokens(feature, reduction, layer)
        return reduction, flops

    def _record(self, action: Action, qkv: QKV, layer: str, extra: int) -> None:
        """Record what an attention computed, `extra` FLOPs more than all; those of a batch's samples add up."""
        step, trace = self.host.step, self.host.trace
        before = trace.events[step.index, step.branch, layer].compute_fraction if qkv.sample else 1.0
        trace.record(step, layer, action, before + extra / trace.flops[layer])

    def _record_kept_tokens(self, feature: str, reduction: Reduction, layer: str) -> None:
        """Record, once for each layer, which tokens of the middle frame stay: rows of "0" and "1" for the page."""
        kept = self.host.trace.method_data["asymrnr"]["kept_tokens"].setdefault(layer, {})
        if feature not in kept:
            f, h, w = self.host.grid
            stays = torch.zeros(f * h * w, dtype=torch.bool, device="cpu").index_fill(
                0, reduction.keep[0].long().cpu(), True
            )
            kept[feature] = ["".join("01"[token] for token in row) for row in stays.view(f, h, w)[f // 2].tolist()]


def core_flops(qkv: QKV, queries: int, keys: int) -> int:
    """FLOPs of an attention core with so many of the video's queries and keys: two products, text beside them."""
    b, _, heads, d = qkv.shape
    return 4 * b * (queries + qkv.text_tokens) * (keys + qkv.text_tokens) * heads * d
