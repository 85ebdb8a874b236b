"""Attention over video and text whose softmax is replaced: what is reduced, what stays, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accel.core.attention import QKV
from accel.core.joint_attention import with_softmax
from accel.errors import AccelError

N, T, D = 6, 3, 4  # video tokens, text tokens, channels
PLACES = {"video first": slice(0, N), "text first": slice(T, T + N), "text around": slice(1, 1 + N)}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The softmax of a processor, as diffusers calls it."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=None)


@pytest.fixture
def qkv() -> list[Tensor]:
    return [draw(i, 2, 2, N + T, D) for i in range(3)]


def masks() -> dict[str, Tensor | None]:
    hidden = torch.ones(2, 1, 1, N + T, dtype=torch.bool)
    return {"no mask": None, "one text token hidden": hidden, "a mask for each query": hidden.expand(-1, -1, N + T, -1)}


def hide(mask: Tensor | None, video: slice) -> Tensor | None:
    """The mask without the last text token."""
    if mask is None:
        return None
    last = N + T - 1 if video.stop < N + T else video.start - 1
    return mask.clone().index_fill_(3, torch.tensor(last), False)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("masking", masks())
def test_a_core_that_changes_nothing_gives_the_same_bits(qkv, place, masking):
    mask = hide(masks()[masking], PLACES[place])
    got = with_softmax(lambda qkv, softmax: softmax(qkv), lambda _: PLACES[place], attention, *qkv, mask)
    assert torch.equal(got, attention(*qkv, mask))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("masking", masks())
@pytest.mark.parametrize("biased, flash", [(False, False), (True, False), (True, True)])
def test_every_second_video_token_is_left_out_and_no_text(qkv, place, masking, biased, flash, monkeypatch):
    monkeypatch.setattr("accel.core.joint_attention.runs_flash", lambda q: flash)
    video, bias = PLACES[place], torch.linspace(0, 1, N // 2).view(1, 1, 1, -1) if biased else None
    mask, seen = hide(masks()[masking], video), []

    def core(qkv: QKV, softmax) -> Tensor:
        seen.append((qkv.shape, qkv.text_tokens))
        y = softmax(QKV(qkv.query()[:, ::2], qkv.key()[:, ::2], qkv.value()[:, ::2], bias))
        return y.repeat_interleave(2, 1)

    got = with_softmax(core, lambda _: video, attention, *qkv, mask)
    kept = [i for i in range(N + T) if not video.start <= i < video.stop or (i - video.start) % 2 == 0]
    at = lambda token: kept.index(token - (token - video.start) % 2 if video.start <= token < video.stop else token)
    added = torch.zeros(1, 1, 1, len(kept))
    if biased:
        added[..., [at(i) for i in range(video.start, video.stop, 2)]] = bias
    if mask is not None:
        added = added.masked_fill(~mask[:, :, kept if mask.shape[2] > 1 else [0]][..., kept], float("-inf"))
    expected = attention(*(x[:, :, kept] for x in qkv), added)
    assert seen == [((2, N, 2, D), T)]
    torch.testing.assert_close(got, expected[:, :, [at(i) for i in range(N + T)]])


def test_the_text_is_that_of_the_first_softmax(qkv):
    def core(qkv: QKV, softmax) -> Tensor:
        y = softmax(qkv)
        softmax(QKV(qkv.query()[:, :2], qkv.key()[:, :2], qkv.value()[:, :2]))
        return y

    assert torch.equal(with_softmax(core, lambda _: slice(0, N), attention, *qkv), attention(*qkv))


@pytest.mark.parametrize("place", PLACES)
def test_fewer_tokens_under_a_causal_mask_are_refused(qkv, place):
    mask = torch.ones(N + T, N + T, dtype=torch.bool).tril()[None, None]
    whole = with_softmax(lambda qkv, softmax: softmax(qkv), lambda _: PLACES[place], attention, *qkv, mask)
    assert torch.equal(whole, attention(*qkv, mask))
    for cause in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        with pytest.raises(AccelError, match="hides frames from each other .causal blocks. do not go together"):
            fewer = lambda qkv, softmax: softmax(QKV(qkv.query()[:, ::2], qkv.key()[:, ::2], qkv.value()[:, ::2]))
            with_softmax(fewer, lambda _: PLACES[place], attention, *qkv, cause)


def test_attention_over_other_tokens_is_left_alone(qkv):
    assert torch.equal(with_softmax(None, lambda _: None, attention, *qkv), attention(*qkv))
    cross = qkv[0], qkv[1][:, :, :2], qkv[2][:, :, :2]
    assert torch.equal(with_softmax(None, lambda _: slice(0, N), attention, *cross), attention(*cross))


def test_an_attention_whose_softmax_is_not_torchs_is_refused(qkv):
    with pytest.raises(AccelError, match="choose the attention backend native"):
        with_softmax(None, lambda _: slice(0, N), lambda q, k, v: q, *qkv)


def test_where_each_sample_has_a_softmax_of_its_own_the_core_gets_their_numbers(qkv):
    each = lambda q, k, v: torch.cat([attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(2)])
    seen = []

    def core(qkv: QKV, softmax) -> Tensor:
        seen.append(qkv.sample)
        return softmax(qkv)

    assert torch.equal(with_softmax(core, lambda _: slice(0, N), each, *qkv), attention(*qkv))
    assert seen == [0, 1]
