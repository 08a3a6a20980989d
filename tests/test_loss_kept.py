"""Memory that `chunked` keeps on a CPU: it comes back when nobody has it, never while somebody does, and carries nothing over."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heads_lightning.losses import kept, linear_cross_entropy

D, V = 16, 1200
HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "the tensor": lambda tensor: tensor,
    "a view": lambda tensor: tensor[3:5],
    "an alias": lambda tensor: tensor.detach(),
    "an array": lambda tensor: tensor.view(torch.uint8).numpy(),
    "its storage": lambda tensor: tensor.untyped_storage(),
    "another framework": lambda tensor: torch.from_dlpack(tensor),
}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LEAST_BYTES", 1)
    monkeypatch.setattr(kept, "_room", [])
    monkeypatch.setattr(kept, "_returned", {})


def waiting() -> list[Tensor]:
    return [buffer for buffers in kept._returned.values() for buffer in buffers]


def lend(rows: int = V) -> Tensor:
    return kept.empty(rows, D, dtype=torch.bfloat16, device=torch.device("cpu"))


def gradients(n: int, dtype: torch.dtype, *, v: int = V, padding: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dX and dW of a random case."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, D, generator=generator).to(dtype).requires_grad_() for size in (n, v + padding))
    labels = torch.randint(0, v, (n,), generator=generator)
    loss = linear_cross_entropy(hidden, weight, labels, implementation="chunked", num_classes=v).total
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_comes_back_when_nobody_has_it(holder: str) -> None:
    tensor = lend()
    place = tensor.data_ptr()
    held = HOLDERS[holder](tensor)
    del tensor
    other = lend()
    assert other.data_ptr() != place
    del held
    assert lend().data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_lies_where_that_of_the_step_before_lay(dtype: torch.dtype) -> None:
    place = gradients(8, dtype)[2].data_ptr()
    assert gradients(11, dtype)[2].data_ptr() == place
    (before,) = (gradient.clone() for gradient in gradients(8, dtype)[2:])
    held = gradients(8, dtype)[2]
    gradients(8, dtype, seed=1)
    assert torch.equal(held, before)


def test_no_more_waits_than_a_step_takes_and_nothing_beside_another_size() -> None:
    held = [lend() for _ in range(kept.MOST_BUFFERS + 3)]
    assert len({tensor.data_ptr() for tensor in held}) == len(held)
    held.clear()
    assert len(waiting()) == kept.MOST_BUFFERS
    assert lend(V + 1).nbytes == (V + 1) * D * 2
    assert {buffer.nbytes for buffer in waiting()} == {(V + 1) * D * 2}


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("n", [21, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_there_before_does_not_matter(dtype: torch.dtype, n: int, padding: int) -> None:
    """A smaller, a larger and the first call again, in memory that the last one left, of inference mode too, and in nothing but NaN."""
    with torch.inference_mode():
        linear_cross_entropy(torch.randn(n, D), torch.randn(V, D), torch.zeros(n, dtype=torch.int64), implementation="chunked")
    want = [tensor.clone() for tensor in gradients(n, dtype, padding=padding)]
    gradients(n + 60, dtype, padding=padding, seed=1)
    for _ in range(2):
        got = gradients(n, dtype, padding=padding)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        del got
        assert waiting()
        assert kept._room
        for buffer in (*kept._room, *waiting()):
            buffer.fill_(255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_add_up_over_micro_batches_and_under_autocast(dtype: torch.dtype) -> None:
    """Two micro-batches of fp32 weights, computed in `dtype`; in the second step all memory is that of the first."""
    torch.manual_seed(0)
    weight, batches = torch.randn(V, D, requires_grad=True), [torch.randn(n, D) for n in (9, 30)]
    wanted = torch.zeros(V, D, dtype=torch.float64)
    for hidden in batches:
        exact = weight.detach().double().requires_grad_()
        linear_cross_entropy(hidden.double(), exact, torch.arange(len(hidden)), implementation="default", reduction="sum").total.backward()
        assert exact.grad is not None
        wanted += exact.grad
    places: list[set[int]] = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for hidden in batches:
                linear_cross_entropy(hidden, weight, torch.arange(len(hidden)), implementation="chunked", reduction="sum").total.backward()
        assert weight.grad is not None
        assert float((weight.grad - wanted).norm() / wanted.norm()) < (1e-6 if dtype == torch.float32 else 1e-2)
        weight.grad = None
        places.append({buffer.data_ptr() for buffer in waiting()})
    assert places[0] == places[1]


def test_calls_of_several_threads_have_memory_of_their_own() -> None:
    want = {seed: [tensor.clone() for tensor in gradients(64, torch.float32, seed=seed)] for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(30):
            got = gradients(64, torch.float32, seed=seed)
            if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(got, want[seed], strict=True)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
