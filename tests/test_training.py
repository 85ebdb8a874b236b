"""The trainers on a few steps: the same function as the stock model, resumable to the same weights."""

import json
import random
import signal
import threading
import time

import pytest
import torch
from torch import nn
from transformers import UMT5EncoderModel

from accel.models import TINY
from accel.training import RECIPES, SETTINGS, base, earlier, export_base, train_parts
from accel.training.base import Denoiser, build_models, build_tokenizer
from accel.training.fit import Matrices, Recipe, fit, rate
from accel.training.vae import Autoencoder, VaeTask, build_vae, clips, put, without_dead_channels


@torch.no_grad()
def test_parallel_time_equals_the_stock_autoencoder():
    vae = build_vae(8, 4).eval()
    x = clips(1, 9, 32, seed=0)
    z = vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(Autoencoder(vae).encode(x)[0], z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(Autoencoder(vae).decode(z).clamp(-1, 1), vae.decode(z).sample, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dead_latent_channels_go_and_the_others_stay_as_they_are():
    """Channels 1 and 3 of five vary by .01: the smaller autoencoder is the larger one with these at their mean, 0."""
    vae, alive = build_vae(8, 5).eval(), [0, 2, 4]
    vae.post_quant_conv.bias.zero_()
    vae.register_to_config(latents_std=[1.0, 0.01, 0.7, 0.01, 2.0], latents_mean=[0.5, 0.0, 0.1, 0.0, 0.2])
    small = without_dead_channels(vae)
    x = clips(1, 5, 32, seed=0)
    z = vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(small.encode(x).latent_dist.mode(), z[:, alive], atol=1e-5, rtol=1e-4)
    z[:, [1, 3]] = 0
    torch.testing.assert_close(small.decode(z[:, alive]).sample, vae.decode(z).sample, atol=1e-5, rtol=1e-4)
    assert small.config.z_dim == 3 and small.config.latents_std == [1.0, 0.7, 2.0]
    assert without_dead_channels(small) is small


@torch.no_grad()
def test_weighted_padding_equals_many_padding_tokens():
    """Six slots of which the last counts for many: the same as a prompt physically padded to 40 or 512."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text, transformer = build_models(len(tokenizer))
    stock = type(transformer).from_config(transformer.config)
    stock.load_state_dict(transformer.state_dict())
    model = Denoiser(text, transformer).eval()
    tokens = tokenizer(["a red star spins"], padding="max_length", max_length=8, return_tensors="pt")
    x = torch.randn(1, 16, 2, 4, 4)
    words = text(tokens.input_ids, tokens.attention_mask).last_hidden_state[:, :5]
    for total in (40, 512):
        padded = torch.cat([words, torch.zeros(1, total - 5, 128)], 1)
        expected = stock(x, torch.tensor([500.0]), padded, return_dict=False)[0]
        got = model(x, [0, 1], torch.tensor([0.5]), tokens.input_ids, tokens.attention_mask, total)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_picked_frames_keep_their_true_times():
    _, transformer = build_models(30)
    stock, picked = transformer.rope, base.PickedFrames(transformer.rope)
    picked.frames = [0, 2, 3]
    for whole, some in zip(stock(torch.empty(1, 16, 4, 2, 3)), picked(torch.empty(1, 16, 3, 2, 3))):
        assert torch.equal(some, whole.unflatten(1, (4, 6))[:, [0, 2, 3]].flatten(1, 2))


def test_pool_draws_the_first_frame_and_later_ones_in_order(tmp_path):
    pool = base.Pool(build_vae(8), 2, 9, 16, 0, tmp_path / "pool.safetensors", "cpu")
    latents, times, captions = pool.draw(3, 3, random.Random(0))
    assert latents.shape == (3, 48, 3, 2, 2) and len(captions) == 3
    assert times[0] == 0 and times == sorted(set(times)) and times[-1] < 5
    assert any(torch.equal(latents[0], clip[:, times].float()) for clip in pool.latents)


def test_muon_turns_a_kernel_by_orthogonal_steps():
    """The step's rows, one per output, are nearly orthonormal, times 0.2 lr sqrt(the longer side)."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
    before, optimizer = kernel.detach().clone(), Matrices([kernel], lr=0.5, weight_decay=0.0)
    (kernel**3).sum().backward()
    optimizer.step()
    scale = torch.linalg.svdvals((kernel.detach() - before).flatten(1)) / (0.2 * 0.5 * 27**0.5)
    assert ((scale > 0.5) & (scale < 1.4)).all()
    optimizer.zero_grad()
    assert kernel.grad is None


@pytest.mark.parametrize("together", [1, 2**26])
def test_matrices_of_one_shape_together_take_the_steps_of_each_alone(together, monkeypatch):
    monkeypatch.setattr(Matrices, "together", together)
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5)]
    begin = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in begin] for _ in range(2))
    silent = nn.Parameter(torch.ones(2, 2))
    options = {"lr": 0.1, "weight_decay": 0.1}
    pair = Matrices([*ours, silent], **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        for weights, optimizer in zip((ours, theirs), pair):
            optimizer.zero_grad()
            sum((w**3).sum() for w in weights).backward()
            optimizer.step()
    for a, b, start in zip(ours, theirs, begin):
        assert (a - b).norm() < 0.03 * (b - start).norm()  # products in bfloat16
    assert (silent == 1).all()


def test_time_embedding_stays_smooth_under_training():
    _, transformer = build_models(30)
    weight = transformer.condition_embedder.time_embedder.linear_1.weight
    silent = weight.abs().sum(0) == 0
    assert 0.3 < silent.float().mean() < 0.7
    transformer.condition_embedder.time_embedder(torch.randn(4, 128)).sum().backward()
    assert (weight.grad[:, silent] == 0).all() and (weight.grad[:, ~silent] != 0).any()


def test_autoencoder_training_can_go_on_from_finished_weights(tmp_path):
    first, second = VaeTask(Recipe(steps=1, lr=1e-3)), VaeTask(Recipe(steps=1, lr=1e-3, seed=1))
    first.module.vae.save_pretrained(tmp_path)
    second.start_from(tmp_path)
    for name, weight in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], weight)


def test_a_run_that_began_with_fewer_latent_channels_goes_on_with_these(tmp_path):
    first = VaeTask(Recipe(steps=1, lr=1e-3))
    first.module.vae = build_vae(z_dim=5)
    torch.save({"module": first.module.state_dict()}, tmp_path / "state.pt")
    second = VaeTask(Recipe(steps=1, lr=1e-3))
    second.shape_as(tmp_path / "state.pt")
    assert second.module.vae.config.z_dim == 5
    second.module.load_state_dict(first.module.state_dict())
    for name, weight in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], weight)


def test_a_training_that_is_stopped_leaves_the_shipped_model_and_its_record_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("accel.training.ROOT", tmp_path)
    monkeypatch.setattr("accel.training.vae.CURRICULUM", ((1.0, 1, 1),))
    finished = []
    monkeypatch.setattr("accel.training.vae.finish", lambda task, folder: finished.append(folder) or {})
    monkeypatch.setitem(RECIPES["small"], "vae", {"steps": 2, "lr": 1e-3, "warmup": 1})
    (tmp_path / TINY).mkdir(parents=True)
    assert train_parts("vae", 0, False, tmp_path / "out")["vae"]["step"] == 1
    assert not finished and not list((tmp_path / TINY).iterdir())
    assert train_parts("vae", None, True, tmp_path / "out")["vae"]["step"] == 2
    assert finished and [f.name for f in (tmp_path / TINY).iterdir()] == ["training.json"]


def test_what_is_finished_takes_the_place_of_what_was_there_with_all_its_shards(tmp_path):
    for name, files in (
        ("made", ["config.json", "vae/one.safetensors"]),
        ("old", ["README.md", "vae/a-of-2.safetensors"]),
    ):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
    put(tmp_path / "made", tmp_path / "old")
    left = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert left == ["old/README.md", "old/config.json", "old/vae/one.safetensors"]


class Line:
    """Fits y = 2 x with one weight: the smallest task."""

    def __init__(self, steps: int = 30):
        torch.manual_seed(1)
        self.recipe, self.module = Recipe(steps=steps, lr=0.1, warmup=3), nn.Linear(1, 1)

    def matrices(self):
        return [self.module.weight]

    def loss(self, model, step, seed):
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(seed))
        return (model(x).float() - 2 * x).square().mean(), {}

    def sheet(self, path):
        path.write_text(f"{self.module.weight.item()}")


def test_resumed_training_equals_uninterrupted(tmp_path):
    whole = Line()
    fit(whole, tmp_path / "whole", minutes=None, resume=False)
    part = Line()
    original, calls = part.loss, []

    def interrupted(model, step, seed):
        calls.append(step)
        if len(calls) == 11:
            signal.raise_signal(signal.SIGINT)
        return original(model, step, seed)

    part.loss = interrupted
    assert fit(part, tmp_path / "part", minutes=None, resume=False)["step"] == 11
    again = Line()
    assert fit(again, tmp_path / "part", minutes=None, resume=True)["step"] == 30
    assert torch.equal(again.module.weight, whole.module.weight)


def test_what_is_looked_at_on_the_way_is_the_average_that_comes_out(tmp_path):
    line, seen = Line(), []
    look = lambda step: seen.append((step, line.module.weight.item())) or step == 20
    done = fit(line, tmp_path, minutes=None, resume=False, look=look, every=10)
    assert [step for step, _ in seen] == [10, 20] and done["step"] == 20 and done["ended"]
    own = torch.load(tmp_path / "state.pt", weights_only=True)["module"]["weight"].item()
    assert line.module.weight.item() == seen[-1][1] != own


def test_training_stops_when_its_minutes_are_over(tmp_path):
    slow = Line(steps=10_000)
    slow.loss, original = lambda *a: (time.sleep(0.05), original(*a))[1], slow.loss
    assert 0 < fit(slow, tmp_path, minutes=0.005, resume=False)["step"] < 100
    assert (tmp_path / "state.pt").is_file() and threading.active_count() < 50


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    broken = Line()
    broken.loss = lambda *a: (broken.module.weight.sum() * float("nan"), {})
    with pytest.raises(RuntimeError, match="the loss became nan at step 0"):
        fit(broken, tmp_path, minutes=None, resume=False)


def test_rate_warms_up_holds_and_falls_to_zero():
    recipe = Recipe(steps=100, lr=1.0, warmup=10, decay_from=0.5)
    assert [rate(s, recipe) for s in (0, 9, 50, 75, 100)] == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


def test_unknown_part_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="unknown part 'everything'; there are vae, base, gpd, meanflow, predictor and all"
    ):
        train_parts("everything", None, False, tmp_path)


def test_base_task_trains_and_its_pipeline_loads_plainly(tmp_path, monkeypatch):
    """Three steps through images, short and whole clips; what is written, stock `WanPipeline` reads."""
    from diffusers import WanPipeline

    monkeypatch.setattr(base, "CURRICULUM", ((0.34, 1, 2), (0.67, 2, 2), (1.0, 0, 2)))
    recipe = Recipe(steps=3, lr=1e-3, warmup=1)
    task = base.BaseTask(recipe, build_vae(8), 16, 5, 4, tmp_path / "work", "cpu")
    assert fit(task, tmp_path / "work", minutes=None, resume=False)["step"] == 3
    base.finish(task, tmp_path / "pipe")
    assert "_name_or_path" not in (tmp_path / "pipe" / "vae" / "config.json").read_text()
    pipe = WanPipeline.from_pretrained(tmp_path / "pipe")
    video = pipe("a red star spins", height=16, width=16, num_frames=5, num_inference_steps=2, output_type="np").frames
    assert video.shape == (1, 5, 16, 16, 3)
    again = base.BaseTask(recipe, build_vae(8), 16, 5, 4, tmp_path / "again")
    again.start_from(tmp_path / "pipe")
    for name, weight in task.module.state_dict().items():
        kept = weight.half().float() if name.startswith("transformer.") else weight  # stored in half the bytes
        assert torch.equal(again.module.state_dict()[name], kept)
    other = base.BaseTask(recipe, build_vae(8, 6), 16, 5, 4, tmp_path / "other")
    other.start_from(tmp_path / "pipe")  # an autoencoder with other channels: the blocks are kept
    assert other.module.transformer.proj_out.weight.shape[0] == 6
    assert torch.equal(*(t.module.transformer.blocks[0].ffn.net[2].weight for t in (other, again)))


def test_new_words_leave_the_old_ids_and_embeddings_alone(tmp_path, monkeypatch):
    every = base.vocabulary()
    monkeypatch.setattr(base, "vocabulary", lambda: [w for w in every if w not in ("cloudy", "a")])
    recipe = Recipe(steps=1, lr=1e-3, warmup=1)
    base.finish(base.BaseTask(recipe, build_vae(8), 16, 5, 2, tmp_path / "old"), tmp_path / "pipe")
    monkeypatch.setattr(base, "vocabulary", lambda: every)
    task = base.BaseTask(recipe, build_vae(8), 16, 5, 2, tmp_path / "new", start=tmp_path / "pipe")
    task.start_from(tmp_path / "pipe")
    known = base.build_tokenizer(tmp_path / "pipe" / "tokenizer").get_vocab()
    n = len(every) + 1  # with three special words and without two
    assert sorted(w for w, i in known.items() if i >= n) == ["a", "cloudy"] and len(known) == n + 2
    old = UMT5EncoderModel.from_pretrained(tmp_path / "pipe" / "text_encoder").shared.weight
    assert len(old) == n and torch.equal(task.module.text.shared.weight[:n], old)
    assert 0 < task.module.text.shared.weight[n:].std() < 0.5 * old.std()


def test_an_export_writes_the_averaged_weights_of_an_unfinished_base(tmp_path, monkeypatch):
    monkeypatch.setattr("accel.training.ROOT", tmp_path)
    monkeypatch.setattr(base, "CURRICULUM", ((1.0, 1, 2),))
    monkeypatch.setitem(SETTINGS, "small", {"size": 16, "frames": 5, "fps": 8, "clips": 2})
    monkeypatch.setitem(RECIPES["small"], "base", {"steps": 9, "lr": 1e-3, "warmup": 1})
    build_vae(8).save_pretrained(tmp_path / TINY / "vae")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export_base("small", tmp_path / "out")
    train_parts("base", 0, False, tmp_path / "out")
    assert not (tmp_path / TINY / "transformer").exists()
    assert export_base("small", tmp_path / "out")["step"] == 1
    weights = torch.load(tmp_path / "out" / "base" / "state.pt", weights_only=True)["ema"]["shadow_params"]
    written = UMT5EncoderModel.from_pretrained(tmp_path / TINY / "text_encoder").shared.weight
    assert torch.equal(written, weights[0])
    assert json.loads((tmp_path / TINY / "training.json").read_text())["base"]["step"] == 1


def test_the_record_of_a_run_keeps_that_of_the_run_it_began_with(tmp_path):
    first = {"steps": 10}
    assert earlier(first, tmp_path) == first  # from finished weights
    (tmp_path / "state.pt").touch()
    assert earlier({"steps": 5, "after": first}, tmp_path) == first  # the second chunk of such a run
    assert earlier(first, tmp_path) is None  # the second chunk of a run from scratch
