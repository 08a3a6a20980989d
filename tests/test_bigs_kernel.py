"""The state-space models of BiGS: kernel and every way to convolve with it, against the definition (B1, B2)."""

from __future__ import annotations

import math

import pytest
import torch
from bigs_reference import complex_kernel, direct_sum, recurrence, system_cast, system_of

from heads_lightning.backbones import fourier, ssm
from heads_lightning.backbones.ssm import S4D
from heads_lightning.configs.layers import Convolution

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("length", [1, 2, 50, 129, 1000])
def test_real_kernel_equals_the_complex_formula(length: int) -> None:
    system = system_of()
    torch.testing.assert_close(system.system().kernel(length), complex_kernel(system, length), rtol=1e-12, atol=1e-13)
    coarse = system_of(dtype=torch.float32)
    exact = complex_kernel(coarse.double(), length)
    assert (system_of(dtype=torch.float32).system().kernel(length).float() - exact).norm() <= 1e-6 * exact.norm()


def test_gradients_of_the_kernel_equal_those_of_the_complex_formula() -> None:
    system, upstream = system_of(), torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    leaves = [system.log_step, system.A_re, system.A_im, system.C]
    ours = torch.autograd.grad(system.system().kernel(200) @ upstream, leaves)
    theirs = torch.autograd.grad(complex_kernel(system, 200) @ upstream, leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("log_step", [math.log(0.01), 0.0])
def test_the_kernel_keeps_six_digits_far_away(log_step: float) -> None:
    """4096 steps and modes that hardly decay: in fp32 the angle alone would cost three of them."""
    system = system_of(log_step=log_step, dtype=torch.float32)
    with torch.no_grad():
        system.A_re.fill_(-1e-4)
    exact = complex_kernel(system_cast(system), 4096)
    assert (system.system().kernel(4096).float() - exact).norm() <= 1e-6 * exact.norm()


def test_a_mode_never_grows() -> None:
    """Learning may carry Re A above zero; the published models hold it at −0.0001."""
    system, held = system_of(8), system_of(8)
    with torch.no_grad():
        system.A_re[::2] = 3.0
        held.A_re[::2] = -1e-4
    assert torch.equal(system.system().kernel(200), held.system().kernel(200))


def test_a_new_system_is_s4d_lin() -> None:
    small = [S4D(1) for _ in range(200)]
    for seed, one in enumerate(small):
        one.reset_parameters(torch.Generator().manual_seed(seed))
    steps = torch.cat([one.log_step.detach().exp() for one in small])
    assert 0.01 <= steps.min() < 0.012
    assert 0.85 < steps.max() <= 1.0
    system = S4D(512)
    system.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(system.A_re, torch.full((512,), -0.5))
    torch.testing.assert_close(system.A_im, math.pi * torch.arange(512))
    assert float(system.C.detach().square().sum(1).mean()) == pytest.approx(1.0, rel=0.2)
    assert float(system.D.detach()) == 1.0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 50, 300, 700])
def test_every_convolution_is_the_direct_sum_and_the_recurrence(length: int, reverse: bool) -> None:
    system = system_of()
    u = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flipped = u.flip(1) if reverse else u
    want = direct_sum(flipped, complex_kernel(system, length)) + system.D * flipped
    torch.testing.assert_close(recurrence(flipped, system) + system.D * flipped, want, rtol=1e-11, atol=1e-11)
    want = want.flip(1) if reverse else want
    discrete = system.system()
    ways = {
        "fft": ssm.fft_convolution(u, discrete.response(length), reverse),
        "toeplitz": ssm.toeplitz_convolution(u, discrete, segments_BS=None, reverse=reverse),
        "chunked": ssm.chunked_convolution(flipped, discrete, segments_BS=None),
    }
    ways["chunked"] = ways["chunked"].flip(1) if reverse else ways["chunked"]
    for form in Convolution:
        ways[form.value + " chosen"] = ssm.convolve(u, discrete, form=form, segments_BS=None, reverse=reverse)
    for name, got in ways.items():
        assert (got - want).abs().max() <= 1e-12 * want.abs().max().clamp(min=1), name
    single = ssm.convolve(u.float(), discrete, form=Convolution.auto, segments_BS=None, reverse=reverse)
    assert (single - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("length", [40, 700])
@pytest.mark.parametrize("form", [Convolution.fft, Convolution.chunked])
def test_gradients_of_the_convolutions_agree(form: Convolution, length: int) -> None:
    generator = torch.Generator().manual_seed(2)
    u, upstream = (torch.randn(2, length, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    results = []
    for way in ("ours", "matrix"):
        for reverse in (False, True):
            system, given = system_of(8), u.clone().requires_grad_()
            if way == "ours":
                y = ssm.convolve(given, system.system(), form=form, segments_BS=None, reverse=reverse)
            else:
                matrix = ssm.toeplitz(complex_kernel(system, length)) + system.D * torch.eye(length)
                y = (matrix.T if reverse else matrix) @ given
            results.append(torch.autograd.grad(y, [given, *system.parameters()], upstream))
    for ours, matrix in zip(results[:2], results[2:], strict=True):
        for mine, other in zip(ours, matrix, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("transforms", [1, 2, 3, 8], ids=lambda n: f"{n} at a time")
def test_blocks_of_transforms_are_those_made_at_once(monkeypatch: pytest.MonkeyPatch, transforms: int) -> None:
    """5 rows of 3 pairs: some pairs of a row, a row, several rows; the last block is smaller."""
    generator, found = torch.Generator().manual_seed(0), []
    u, kernel, upstream = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 9, 6), (9,), (5, 9, 6)))
    for at_once in (100, transforms):
        monkeypatch.setattr(fourier, "CACHED_BYTES", at_once * fourier.fast_size(18) * 16)
        given = u.clone().requires_grad_(), kernel.clone().requires_grad_()
        y = ssm.fft_convolution(*given, False)
        found.append((y, *torch.autograd.grad(y, given, upstream)))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
