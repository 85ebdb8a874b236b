"""The base model's trainer: padding, subsampled frames, and a pipeline that stock diffusers loads."""

import random

import torch
from diffusers import WanPipeline
from transformers import UMT5EncoderModel

from accel.training.loop import fit
from accel.training.optimizer import OptimConfig
from accel.training.tasks import base_model as base
from accel.training.tasks.base_model import Denoiser, build_models, build_tokenizer
from accel.training.tasks.vae import build_vae


@torch.no_grad()
def test_weighted_padding_equals_many_padding_tokens():
    """Eight tokens whose padding counts for many equal a prompt that is padded to 40 or 512 tokens."""
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


def test_subsampled_frames_keep_their_positions_in_time():
    _, transformer = build_models(30)
    stock, subsampled = transformer.rope, base.SubsampledRoPE(transformer.rope)
    subsampled.frames = [0, 2, 3]
    for full, some in zip(stock(torch.empty(1, 16, 4, 2, 3)), subsampled(torch.empty(1, 16, 3, 2, 3))):
        assert torch.equal(some, full.unflatten(1, (4, 6))[:, [0, 2, 3]].flatten(1, 2))


def test_the_dataset_draws_the_first_frame_and_later_ones_in_order(tmp_path):
    dataset = base.LatentDataset(build_vae(8), 2, 9, 16, 0, tmp_path / "pool.safetensors", "cpu")
    latents, times, captions = dataset.draw(3, 3, random.Random(0))
    assert latents.shape == (3, 48, 3, 2, 2) and len(captions) == 3
    assert times[0] == 0 and times == sorted(set(times)) and times[-1] < 5
    assert any(torch.equal(latents[0], clip[:, times].float()) for clip in dataset.latents)


def test_a_single_frame_is_any_one_of_its_clip(tmp_path):
    dataset = base.LatentDataset(build_vae(8), 1, 9, 16, 0, tmp_path / "pool.safetensors", "cpu")
    rng = random.Random(0)
    drawn = [dataset.draw(1, 1, rng)[:2] for _ in range(30)]
    assert {time for _, (time,) in drawn} == {0, 1, 2, 3, 4}
    assert all(torch.equal(frame[0], dataset.latents[0][:, times].float()) for frame, times in drawn)


def test_zeroed_time_frequencies_stay_zero_in_training():
    _, transformer = build_models(30)
    weight = transformer.condition_embedder.time_embedder.linear_1.weight
    silent = weight.abs().sum(0) == 0
    assert 0.3 < silent.float().mean() < 0.7
    transformer.condition_embedder.time_embedder(torch.randn(4, 128)).sum().backward()
    assert (weight.grad[:, silent] == 0).all() and (weight.grad[:, ~silent] != 0).any()


def test_clips_are_encoded_in_an_autocast_as_outside_one(tmp_path):
    """The first training step asks for them, on a device with fast bfloat16 in an autocast."""
    vae = build_vae(8)
    task = lambda folder: base.BaseTask(OptimConfig(steps=1, lr=1e-3), vae, 16, 5, 2, tmp_path / folder)
    with torch.autocast("cpu", torch.bfloat16):
        inside = task("inside").dataset.latents
    assert torch.equal(inside, task("outside").dataset.latents)


def test_the_base_trains_and_its_pipeline_loads_with_stock_diffusers(tmp_path, monkeypatch):
    """Three steps, on images, short and full clips; the stock `WanPipeline` loads what is written."""
    monkeypatch.setattr(base, "CURRICULUM", ((0.34, ((1, 2),)), (0.67, ((2, 2),)), (1.0, ((0, 2),))))
    optim = OptimConfig(steps=3, lr=1e-3, warmup=1)
    task = base.BaseTask(optim, build_vae(8), 16, 5, 4, tmp_path / "work", "cpu")
    assert fit(task, tmp_path / "work", minutes=None, resume=False)["step"] == 3
    base.finish(task, tmp_path / "pipe")
    assert "_name_or_path" not in (tmp_path / "pipe" / "vae" / "config.json").read_text()
    pipe = WanPipeline.from_pretrained(tmp_path / "pipe")
    video = pipe("a red star spins", height=16, width=16, num_frames=5, num_inference_steps=2, output_type="np").frames
    assert video.shape == (1, 5, 16, 16, 3)
    again = base.BaseTask(optim, build_vae(8), 16, 5, 4, tmp_path / "again")
    again.start_from(tmp_path / "pipe")
    for name, weight in task.module.state_dict().items():
        stored = weight.half().float() if name.startswith("transformer.") else weight
        assert torch.equal(again.module.state_dict()[name], stored)
    other = base.BaseTask(optim, build_vae(8, 6), 16, 5, 4, tmp_path / "other")
    other.start_from(tmp_path / "pipe")  # the autoencoder has other channels: only the blocks are loaded
    assert other.module.transformer.proj_out.weight.shape[0] == 6
    assert torch.equal(*(t.module.transformer.blocks[0].ffn.net[2].weight for t in (other, again)))


def test_new_words_change_no_old_id_or_embedding(tmp_path, monkeypatch):
    every = base.vocabulary()
    monkeypatch.setattr(base, "vocabulary", lambda: [w for w in every if w not in ("cloudy", "a")])
    optim = OptimConfig(steps=1, lr=1e-3, warmup=1)
    base.finish(base.BaseTask(optim, build_vae(8), 16, 5, 2, tmp_path / "old"), tmp_path / "pipe")
    monkeypatch.setattr(base, "vocabulary", lambda: every)
    task = base.BaseTask(optim, build_vae(8), 16, 5, 2, tmp_path / "new", start=tmp_path / "pipe")
    task.start_from(tmp_path / "pipe")
    known = base.build_tokenizer(tmp_path / "pipe" / "tokenizer").get_vocab()
    n = len(every) + 1  # with three special words and without two
    assert sorted(w for w, i in known.items() if i >= n) == ["a", "cloudy"] and len(known) == n + 2
    old = UMT5EncoderModel.from_pretrained(tmp_path / "pipe" / "text_encoder").shared.weight
    assert len(old) == n and torch.equal(task.module.text.shared.weight[:n], old)
    assert 0 < task.module.text.shared.weight[n:].std() < 0.5 * old.std()
