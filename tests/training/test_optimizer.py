"""The learning-rate schedule, and Muon for batches of matrices."""

import pytest
import torch
from torch import nn

from accel.training.optimizer import BatchedMuon, OptimConfig, learning_rate


def test_the_learning_rate_warms_up_holds_and_falls_to_zero():
    optim = OptimConfig(steps=100, lr=1.0, warmup=10, decay_from=0.5)
    assert [learning_rate(s, optim) for s in (0, 9, 50, 75, 100)] == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


def test_muon_updates_a_kernel_by_an_orthogonal_matrix():
    """The rows of the update, one per output, are nearly orthonormal, times 0.2 lr sqrt(longer side)."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
    before, optimizer = kernel.detach().clone(), BatchedMuon([kernel], lr=0.5, weight_decay=0.0)
    (kernel**3).sum().backward()
    optimizer.step()
    scale = torch.linalg.svdvals((kernel.detach() - before).flatten(1)) / (0.2 * 0.5 * 27**0.5)
    assert ((scale > 0.5) & (scale < 1.4)).all()
    optimizer.zero_grad()
    assert kernel.grad is None


@pytest.mark.parametrize("max_numel", [1, 2**26])
def test_batched_muon_equals_torchs_muon_on_each_matrix(max_numel, monkeypatch):
    monkeypatch.setattr(BatchedMuon, "max_numel", max_numel)
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5)]
    begin = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in begin] for _ in range(2))
    silent = nn.Parameter(torch.ones(2, 2))
    options = {"lr": 0.1, "weight_decay": 0.1}
    pair = BatchedMuon([*ours, silent], **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        for weights, optimizer in zip((ours, theirs), pair):
            optimizer.zero_grad()
            sum((w**3).sum() for w in weights).backward()
            optimizer.step()
    for a, b, start in zip(ours, theirs, begin):
        assert (a - b).norm() < 0.03 * (b - start).norm()  # matrix products may be in bfloat16
    assert (silent == 1).all()
