"""Example prompts: the world's own sentences for the toy model, everyday scenes for all others."""

from accel.runtime.example_prompts import example_prompts
from accel.runtime.models import TINY, read_defaults
from accel.world.scene import ATTRIBUTES, read_caption


def test_examples_of_the_toy_model_say_all_attributes():
    prompts = example_prompts(read_defaults(TINY))
    assert (
        all(read_caption(prompt).keys() >= set(ATTRIBUTES) for prompt in prompts)
        and len(set(prompts)) == len(prompts) >= 4
    )


def test_other_models_get_everyday_scenes_enough_for_a_calibration():
    prompts = example_prompts(None)
    assert len(set(prompts)) == len(prompts) >= 16 and not any("background" in prompt for prompt in prompts)
