"""Halves of a batch under guidance."""

import pytest
import torch

from accel.core.calls import halves
from accel.errors import AccelError


def test_what_has_an_entry_for_each_sample_is_halved_and_all_else_goes_to_both_halves():
    x, one = torch.arange(4.0), torch.ones(1)
    (uncond, first), (cond, second) = halves(x, {"encoder_hidden_states": 10 * x, "ofs": one, "encoder_mask": one})
    assert (uncond.tolist(), cond.tolist()) == ([0, 1], [2, 3])
    assert first["encoder_hidden_states"].tolist() == [0, 10] and second["encoder_hidden_states"].tolist() == [20, 30]
    assert first["ofs"] is second["ofs"] is one and first["encoder_mask"] is one


def test_text_for_another_number_of_samples_is_refused():
    """LTX and Mochi do not repeat given embeddings for num_videos_per_prompt: a half would get those of both."""
    with pytest.raises(AccelError, match="encoder_attention_mask has 2 entries for a batch of 4: repeat given"):
        halves(torch.zeros(4, 1), {"encoder_attention_mask": torch.ones(2, 5)})
