"""The CPU's attention for training has the values and gradients of the stock one."""

import torch
import torch.nn.functional as F

from accel.training.fast_blocks import CrossAttention, DenseAttention, _DenseBackward


def test_the_gradients_of_dense_attention_are_those_of_its_values():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.testing.assert_close(_DenseBackward.apply(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.autograd.gradcheck(_DenseBackward.apply, (q, k, v))


def test_in_bfloat16_the_gradients_are_near_those_of_float32():
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 40, 3, 16).transpose(1, 2) for _ in range(4))
    found = []
    for dtype, attend in ((torch.float32, F.scaled_dot_product_attention), (torch.bfloat16, _DenseBackward.apply)):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        found.append(torch.autograd.grad(attend(*inputs), inputs, grad.to(dtype)))
    for exact, near in zip(*found, strict=True):
        assert (near.float() - exact).norm() < 0.02 * exact.norm() and near.dtype == torch.bfloat16


def test_blocks_with_the_attention_for_training_give_the_stock_values(pipe):
    x, text = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 7, pipe.transformer.config.text_dim)
    run = lambda: pipe.transformer(x, torch.tensor([500.0]), text, return_dict=False)[0]
    stock = run()
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(DenseAttention())
        block.attn2.set_processor(CrossAttention())
    torch.testing.assert_close(run(), stock)
