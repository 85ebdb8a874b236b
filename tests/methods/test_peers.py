"""Peers: diffusers' own caches, as they are, with the work that they skip counted."""

import json

import pytest
import torch
from families.tiny import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import accel
from accel.errors import AccelError
from accel.evaluation.magcache_ratios import run_calibration
from accel.families import family_of
from accel.methods import METHODS
from accel.methods.peers import RATIOS, DiffusersPeer
from accel.runtime.generate import preflight
from accel.runtime.models import ModelDefaults
from accel.runtime.presets import required_settings
from accel.runtime.run import Cancelled, build_run

STEPS = 12
PEERS = [name for name, method in METHODS.items() if issubclass(method, DiffusersPeer)]
ACTIVE = {
    "taylorseer": {"modules": "all"},
    "seacache": {"threshold": 1.0},
    "firstblockcache": {"threshold": 0.5},
    "magcache": {"threshold": 0.5},
}
BATCHED = ["pab", "diffusers_fastercache"]  # they do not tell the branches of guidance apart
RUNS = [(name, "cogvideox" if name in BATCHED else "wan") for name in PEERS]


def attributes(pipe) -> dict:
    """Names of the attributes of every module: what a cache could leave behind, hooks included."""
    return {name: sorted(vars(m)) for name, m in pipe.transformer.named_modules()}


def cancel(pipe, index, t, tensors):
    """Cancels a run while every cache is filled."""
    if index == 8:
        raise Cancelled
    return {}


def peer_of(name, **parameters):
    return METHODS[name](**ACTIVE.get(name, {}) | parameters)


@pytest.fixture
def build(tmp_path):
    """build(family): a tiny pipeline whose model has ratios for MagCache, and run(pipe): its latents."""
    (tmp_path / RATIOS).write_text(json.dumps({"steps": 2, "ratios": [1.0, 0.98]}))

    def make(family):
        pipe, inputs = TINY[family]()
        pipe.register_to_config(_name_or_path=str(tmp_path))

        def run(steps=STEPS, **more):
            seeded = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
            return pipe(**inputs | more, num_inference_steps=steps, **seeded).frames

        return pipe, run

    return make


def by_hand(pipe, method, steps=STEPS):
    """Diffusers' cache enabled by its own interface."""
    host = type("Host", (), {"pipe": pipe, "family": family_of(pipe)})()
    config = method.config(host, pipe.transformer)
    if hasattr(config, "num_inference_steps"):
        config = type(config)(**vars(config) | {"num_inference_steps": steps, "mag_ratios": [1.0, 0.98]})
    pipe.transformer.enable_cache(config)


@pytest.mark.parametrize("name, family", RUNS)
def test_a_peer_is_bitwise_the_cache_enabled_by_hand_and_its_work_is_what_was_computed(name, family, build):
    pipe, run = build(family)
    method = peer_of(name)
    before = attributes(pipe)
    with accel.apply(pipe, method) as trace, sdpa_kernel(SDPBackend.MATH):  # whose FLOPs torch counts
        latents, summary = run(), trace.summary()
    assert attributes(pipe) == before and not pipe.transformer.is_cache_enabled and not summary["messages"]
    by_hand(pipe, method)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(run(), latents)
    computed = counter.get_flop_counts()[type(pipe.transformer).__name__]
    assert summary["flops"] == sum(computed.values()) < 0.98 * summary["flops_full"]
    assert 0 < summary["peak_bytes"] <= summary["estimated_bytes"]


@pytest.mark.parametrize("name, family", RUNS)
def test_a_cancelled_run_leaves_nothing_to_the_next_one_or_in_the_model(name, family, build):
    pipe, run = build(family)
    with accel.apply(pipe, peer_of(name)):
        alone = run()
    before = attributes(pipe)
    with accel.apply(pipe, peer_of(name)):
        with pytest.raises(Cancelled):
            run(callback_on_step_end=cancel)
        assert torch.equal(run(), alone)
    with pytest.raises(Cancelled), accel.apply(pipe, peer_of(name)):
        run(callback_on_step_end=cancel)
    assert attributes(pipe) == before and not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_runs_alone(name, pipe):
    others = ["fastercache", next(other for other in PEERS if other != name)]
    for other in others:
        with pytest.raises(ValueError, match="do not go together: a peer runs alone"):
            required_settings({name: {}, other: {}})
        with pytest.raises(ValueError, match="do not go together"), accel.apply(pipe, [METHODS[other], METHODS[name]]):
            pass


def test_a_cache_that_the_user_has_enabled_is_refused_beside_a_peer(pipe):
    by_hand(pipe, METHODS["firstblockcache"]())
    with pytest.raises(ValueError, match="diffusers' FirstBlockCache and accel.apply"), accel.apply(pipe, "seacache"):
        pass


@pytest.mark.parametrize("name", PEERS)
def test_neutral_settings_and_too_few_steps_are_told(name, pipe, sample, tmp_path):
    (tmp_path / RATIOS).write_text(json.dumps({"steps": 2, "ratios": [1.0, 0.98]}))
    pipe.register_to_config(_name_or_path=str(tmp_path))
    neutral, baseline = METHODS[name](**METHODS[name].neutral), sample(pipe, steps=2, guidance=1.0)
    for method, steps in ((neutral, 2), (METHODS[name](), 1)):
        with accel.apply(pipe, method) as trace:
            latents = sample(pipe, steps=steps, guidance=1.0)
        assert trace.messages[0].startswith(f"{method.title} does nothing: ") and len(trace.messages) == 1
        assert steps == 1 or torch.equal(latents, baseline)


def test_a_run_in_which_nothing_was_skipped_is_told(pipe, sample):
    with accel.apply(pipe, METHODS["firstblockcache"](threshold=0.01)) as trace:
        sample(pipe, steps=4)
    title = "FirstBlockCache (diffusers)"
    assert trace.messages == [f"{title} skipped nothing in this run: every step was computed in full"]


REFUSED = {
    ("pab", "wan"): "cannot run here: it would mix up the branches of guidance, which WanPipeline computes one after",
    ("diffusers_fastercache", "ltx"): "LTXVideoTransformer3DModel: diffusers does not know the format of its latents",
    ("pab", "kandinsky5"): "Kandinsky5T2VPipeline does not tell its current_timestep",
    ("seacache", "ltx"): "LTXPipeline does not tell its cache_context the noise level",
    ("taylorseer", "kandinsky5"): "Kandinsky5T2VPipeline does not name its calls by a cache_context",
    ("firstblockcache", "skyreels_v2"): "diffusers has not registered SkyReelsV2TransformerBlock for it",
    ("magcache", "wan_vace"): "the model changes hidden states between its blocks",
    ("magcache", "wan_22"): "its ratios belong to the steps of one transformer, and this pipeline has two",
}


@pytest.mark.parametrize("name, family", REFUSED)
def test_a_model_on_which_diffusers_cache_cannot_run_is_refused_in_a_sentence(name, family, build):
    pipe, run = build(family)
    with pytest.raises(ValueError) as error, accel.apply(pipe, peer_of(name)):
        run(**{"guidance_scale": 1.0} if family == "kandinsky5" and name == "pab" else {})
    assert str(error.value).startswith(f"{METHODS[name].title} cannot run")
    assert REFUSED[name, family] in str(error.value) and not pipe.transformer.is_cache_enabled


def test_magcache_is_calibrated_in_a_run_and_refused_before(pipe, monkeypatch, tmp_path):
    defaults = ModelDefaults(height=64, width=64, frames=5, steps=4, guidance=1.0, text_length=6)
    monkeypatch.setattr("accel.evaluation.magcache_ratios.load_pipeline", lambda model: pipe)
    monkeypatch.setattr("accel.evaluation.magcache_ratios.model_defaults", lambda pipe, model: defaults)

    def generate(run, pipe, defaults, on_step):
        """Blocks whose residual doubles in each step."""
        for done in range(1, run.steps + 1):
            with pipe.transformer.cache_context("cond"):
                hidden = torch.ones(1, 3, 24)
                for block in pipe.transformer.blocks:
                    hidden = block(hidden, done)
            on_step(done)

    for block in pipe.transformer.blocks:
        block.forward = lambda hidden, done: hidden + 2.0**done
    monkeypatch.setattr("accel.evaluation.magcache_ratios.generate", generate)
    with pytest.raises(ValueError, match="finds no ratios in .*magcache.json"), accel.apply(pipe, "magcache"):
        pass
    found = run_calibration("nowhere", "a red star", 0, None, tmp_path)
    assert found["ratios"] == [1.0, 2.0, 2.0, 2.0] and not pipe.transformer.is_cache_enabled
    with accel.apply(pipe, METHODS["magcache"](ratios=str(tmp_path / RATIOS))):
        pass
    (tmp_path / RATIOS).write_text("{}")
    with pytest.raises(ValueError, match="holds no ratios"):
        with accel.apply(pipe, METHODS["magcache"](ratios=str(tmp_path / RATIOS))):
            pass


@pytest.mark.parametrize("name", BATCHED)
def test_a_run_whose_branches_a_cache_would_mix_up_is_refused_before_it_begins(name, pipe):
    defaults = ModelDefaults(height=64, width=64, frames=5, steps=4, guidance=4.0, text_length=6)
    run = lambda guidance, **settings: build_run(
        defaults, model="m", prompt="x", guidance=guidance, methods={name: settings}
    )
    with pytest.raises(AccelError, match="which this pipeline computes one after the other"):
        preflight(run(4.0), pipe)
    preflight(run(1.0), pipe)
    preflight(run(4.0, **METHODS[name].neutral), pipe)
