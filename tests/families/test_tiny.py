"""The tiny pipelines of all families run in stock diffusers, and the text tells on their latents."""

import pytest
import torch
from families.tiny import EACH_FAMILY, TINY

CASES = [pytest.param(name, marks=() if name in EACH_FAMILY else pytest.mark.slow) for name in TINY]


def is_embedding(name: str) -> bool:
    return name.startswith("prompt_embeds") and "mask" not in name


@pytest.mark.parametrize("name", CASES)
def test_stock_pipeline_gives_finite_latents_that_depend_on_the_text(name):
    pipe, inputs = TINY[name]()

    def run(inputs: dict) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(**inputs, num_inference_steps=3, generator=generator, output_type="latent").frames

    latents = run(inputs)
    assert latents.isfinite().all() and latents.std() > 0.1
    other_text = {name: value.flip(-1) if is_embedding(name) else value for name, value in inputs.items()}
    assert (run(other_text) - latents).abs().max() > 1e-3
