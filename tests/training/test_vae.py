"""The autoencoder's trainer: the same function as the stock class, dead channels, starting from finished weights."""

import torch
from diffusers import AutoencoderKLWan

from accel.training.loop import fit
from accel.training.optimizer import OptimConfig
from accel.training.tasks.vae import (
    Autoencoder,
    VaeTask,
    build_vae,
    clips,
    finish,
    replace_files,
    trains_encoder,
    without_dead_channels,
)


@torch.no_grad()
def test_parallel_time_equals_the_stock_autoencoder():
    vae = build_vae(8, 4).eval()
    x = clips(1, 9, 32, seed=0)
    z = vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(Autoencoder(vae).encode(x)[0], z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(Autoencoder(vae).decode(z).clamp(-1, 1), vae.decode(z).sample, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dead_latent_channels_are_removed_and_the_others_unchanged():
    """Channels 1 and 3 of five vary by .01: the small autoencoder equals the large one with these at their mean, 0."""
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


def test_autoencoder_training_can_start_from_finished_weights(tmp_path):
    first, second = VaeTask(OptimConfig(steps=1, lr=1e-3)), VaeTask(OptimConfig(steps=1, lr=1e-3, seed=1))
    first.module.vae.save_pretrained(tmp_path)
    second.start_from(tmp_path)
    for name, weight in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], weight)


def test_a_run_with_fewer_latent_channels_resumes_with_as_many(tmp_path):
    first = VaeTask(OptimConfig(steps=1, lr=1e-3))
    first.module.vae = build_vae(z_dim=5)
    torch.save({"module": first.module.state_dict()}, tmp_path / "state.pt")
    second = VaeTask(OptimConfig(steps=1, lr=1e-3))
    second.shape_as(tmp_path / "state.pt")
    assert second.module.vae.config.z_dim == 5
    second.module.load_state_dict(first.module.state_dict())
    for name, weight in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], weight)


def test_the_decoder_alone_is_trained_where_a_base_model_knows_the_latents(tmp_path, monkeypatch):
    """A run, its checkpoint and the finished files: latents are the same, pictures are not."""
    task = VaeTask(OptimConfig(steps=1, lr=1e-2, warmup=1), size=16, frames=5)
    monkeypatch.setattr("accel.training.tasks.vae.CURRICULUM", ((1.0, 5, 1),))
    task.module.vae = build_vae(8, 4)
    task.module.vae.save_pretrained(tmp_path / "old")
    task.keep_latents()
    fit(task, tmp_path / "run", minutes=None, resume=False)
    assert not trains_encoder(tmp_path / "run" / "state.pt")
    finish(task, tmp_path / "new")
    old, new = (AutoencoderKLWan.from_pretrained(tmp_path / name) for name in ("old", "new"))
    x = clips(1, 5, 16, seed=0)
    z = old.encode(x).latent_dist.mode()
    torch.testing.assert_close(new.encode(x).latent_dist.mode(), z, atol=2e-3, rtol=2e-3)  # stored in half precision
    assert new.config.latents_std == old.config.latents_std
    assert (new.decode(z).sample - old.decode(z).sample).abs().max() > 0.01


def test_finished_files_replace_the_old_ones_and_all_old_shards(tmp_path):
    for name, files in (
        ("made", ["config.json", "vae/one.safetensors"]),
        ("old", ["README.md", "vae/a-of-2.safetensors"]),
    ):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
    replace_files(tmp_path / "made", tmp_path / "old")
    left = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert left == ["old/README.md", "old/config.json", "old/vae/one.safetensors"]
