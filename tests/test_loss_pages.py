"""Large gradients lie in memory that asks for huge pages, and are tensors like any other."""

import copy
import io

import pytest
import torch

from heads_lightning.losses import linear_cross_entropy, pages

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_large_tensor_begins_with_a_huge_page_and_owns_no_more_than_itself(dtype: torch.dtype) -> None:
    made = [pages.empty(1 << 12, 1025, dtype=dtype, device=CPU).fill_(i) for i in range(3)]
    for i, tensor in enumerate(made):  # each its own memory, which outlives the array that it came from
        assert tensor.shape == (1 << 12, 1025)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % pages.ALIGNMENT == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert bool((tensor == i).all())


def test_small_tensors_and_other_devices_are_torchs_own() -> None:
    assert pages.empty(4, dtype=torch.float32, device=CPU).untyped_storage().resizable()
    assert pages.empty(1 << 12, 1025, dtype=torch.float32, device=torch.device("meta")).is_meta


def test_gradients_in_them_are_accumulated_copied_and_saved() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 256, requires_grad=True), torch.nn.Parameter(torch.randn(1 << 13, 256) / 16)
    labels = torch.randint(0, len(weight), (8,))

    def gradient(implementation: str) -> torch.Tensor:
        (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, implementation=implementation).total, weight)
        return found

    for _ in range(2):
        linear_cross_entropy(hidden, weight, labels, implementation="chunked").total.backward()
    assert weight.grad is not None
    assert weight.grad.nbytes >= pages.LARGE_BYTES
    torch.testing.assert_close(weight.grad, 2 * gradient("default"))
    file = io.BytesIO()
    torch.save(weight.grad, file)
    file.seek(0)
    for other in (copy.deepcopy(weight.grad), torch.load(file)):
        assert torch.equal(other, weight.grad)
    torch.nn.utils.clip_grad_norm_([weight], 1e-3)
    assert float(weight.grad.norm()) == pytest.approx(1e-3, rel=1e-3)
