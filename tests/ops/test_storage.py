"""Cache formats: what rounding to 8 bits changes, and what is held where."""

import pytest
import torch

from accel.ops.storage import Stored, store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_eight_bits_round_by_a_sixteenth_at_most_whatever_the_size(size, dtype):
    x = (size * torch.linspace(-1, 1, 512).reshape(2, 8, 32)).to(dtype)
    stored = store(x, "fp8")
    error = (stored.load() - x).abs()
    assert stored.load().dtype == dtype and stored.nbytes == 512 + 2 * dtype.itemsize
    assert (error <= 0.07 * x.abs() + 0.01 * size).all() and error.max() > 0


def test_the_scale_of_a_sample_does_not_depend_on_the_others():
    small, large = torch.randn(2, 1, 8, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    large = 1000 * large
    both = store(torch.cat([small, large]), "fp8").load()
    assert torch.equal(both[:1], store(small, "fp8").load())


def test_zeros_stay_zeros():
    assert not store(torch.zeros(1, 2, 3), "fp8").load().any()


def test_in_cpu_memory_is_a_copy_of_the_same_bits():
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    stored = store(x, "cpu")
    assert torch.equal(stored.load(), x) and stored.data.data_ptr() != x.data_ptr()


def test_what_is_in_cpu_memory_takes_no_bytes_of_another_device():
    x = torch.ones(1, 2, 3)
    assert Stored(x, None, x.dtype, torch.device("meta")).nbytes == 0 < Stored(x, None, x.dtype, x.device).nbytes
