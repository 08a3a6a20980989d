"""A diagonal state-space model (S4D, arXiv 2206.11893) that all channels share: discretisation, kernel, convolution, recurrence.

The system is x' = A x + B u, y = Re(C x) + D u with diagonal complex A and B = 1, held constant over steps of dt (zero-order hold):

    x_t = e^λ x_{t-1} + u_t        y_t = Re(g x_t) + D u_t        λ = dt·A, g = C (e^λ − 1)/A

so that y is a causal convolution with K[l] = Re Σ g e^{lλ} (no conjugate pairing, no factor 2: all M modes are free). Choices:

- Real arithmetic: every complex number is a pair of reals, which compiles, and which has a type below fp32 nowhere on its way.
- The system is discretised in fp64 where the device has it: angles l·Im λ reach 10⁵ radians, of which fp32 keeps two digits. It costs
  nothing, for powers are taken at √L + √L exponents only, e^{(ic+j)λ} = e^{icλ} e^{jλ}; one small matrix product makes the kernel.
- One kernel serves all channels, so a convolution is also a plain matrix product with a Toeplitz matrix, or with one for each chunk and a
  state in between. That form can stop at the border of a packed document, which a Fourier transform cannot.

Letters beside those of batch.py: M modes of the state, C chunks of a sequence, P positions of a chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads_lightning.backbones.fourier import fft_convolution
from heads_lightning.configs.layers import Convolution
from heads_lightning.precision import widest_float
from heads_lightning.registry import RunError

LEAST_DECAY = 1e-4
"""Re A is at most minus this: the published models clamp it there."""
WHOLE_UP_TO = 256
"""Positions up to which the chunked form is one chunk: a plain Toeplitz product. Measured on CPU (experiments/benchmarks/bigs.py)."""
CHUNK = 128
"""Positions of a chunk beyond that: about as many as the state has real numbers."""


class Pair(NamedTuple):
    """Complex numbers as reals."""

    re: Tensor
    im: Tensor

    def times(self, other: Pair) -> Pair:
        """The product, broadcast."""
        return Pair(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)


class System(NamedTuple):
    """A discretised system; tensors [M], D [1], in fp64 (fp32 where the device has no fp64)."""

    rate: Pair
    """λ: log of what a mode is multiplied by in one step."""
    gain: Pair
    """g: what the output takes from the state."""
    D: Tensor
    """What it takes from the input at the same position."""

    def powers(self, exponents: Tensor) -> Pair:
        """e^{lλ}, [len(exponents), M]."""
        exponents = exponents.to(self.rate.re)[:, None]
        size, angle = (exponents * self.rate.re).exp(), exponents * self.rate.im
        return Pair(size * angle.cos(), size * angle.sin())

    def read_out(self, exponents: Tensor) -> Tensor:
        """What the output takes from a state that is l steps old: Re(g e^{lλ} x) as a row over (re x, im x); [len(exponents), 2M]."""
        seen = self.powers(exponents).times(self.gain)
        return torch.cat((seen.re, -seen.im), dim=1)

    def write_in(self, length: int) -> Tensor:
        """What inputs at positions 0 … length − 1 leave in the state after the last of them: [2M, length]."""
        left = self.powers(torch.arange(length - 1, -1, -1, device=self.rate.re.device))
        return torch.cat((left.re, left.im), dim=1).T

    def response(self, length: int) -> Tensor:
        """What an input adds to the outputs 0 … length − 1 positions later: K, and D at once. So the term D u costs nothing of its own."""
        return self.kernel(length) + F.pad(self.D, (0, length - 1))

    def kernel(self, length: int) -> Tensor:
        """K[0 … length − 1]."""
        fine = max(1, 2 ** round(math.log2(length) / 2))
        index = torch.arange(max(fine, -(-length // fine)), device=self.rate.re.device)
        powers = self.powers(index[:fine])
        coarse_I2M = self.read_out(index[: -(-length // fine)] * fine)
        return (coarse_I2M @ torch.cat((powers.re, powers.im), dim=1).T).flatten()[:length]


def discretise(log_step: Tensor, A_re: Tensor, A_im: Tensor, C: Tensor, D: Tensor) -> System:
    """Zero-order hold with B = 1. log_step and D [1], A_re and A_im [M], C [M, 2] (real and imaginary part)."""
    exact = widest_float(log_step.device)
    dt, im = log_step.to(exact).exp(), A_im.to(exact)
    re = A_re.to(exact).clamp(max=-LEAST_DECAY)
    rate = Pair(dt * re, dt * im)
    # e^λ − 1 without cancellation for small λ: e^x cos y − 1 = (e^x − 1) cos y − 2 sin²(y/2)
    grown = Pair(rate.re.expm1() * rate.im.cos() - 2 * (rate.im / 2).sin().square(), rate.re.exp() * rate.im.sin())
    inverse = Pair(re, -im)
    held = grown.times(inverse)
    size = re.square() + im.square()
    gain = Pair(*C.to(exact).unbind(dim=1)).times(Pair(held.re / size, held.im / size))
    return System(rate, gain, D.to(exact))


class S4D(nn.Module):
    """The learned system and its convolution, in fp32 or better whatever the precision around it. Input and output [B, S, D].

    A system rounded to bf16 is another system (at dt = 0.01 its kernel is 98 % off), so casting the module leaves its parameters alone.
    """

    def __init__(self, modes: int) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.A_re = nn.Parameter(torch.empty(modes, dtype=torch.float32))
        self.A_im = nn.Parameter(torch.empty(modes, dtype=torch.float32))
        self.C = nn.Parameter(torch.empty(modes, 2, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        def keep(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return tensor.to(made.device) if made.is_floating_point() and made.dtype.itemsize < 4 else made

        return super()._apply(keep, recurse)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """S4D-Lin: A = −1/2 + iπn, dt log-uniform in [0.01, 1], C normal of unit variance, D = 1."""
        with torch.no_grad():
            nn.init.uniform_(self.log_step, math.log(0.01), 0.0, generator=generator)
            self.A_re.fill_(-0.5)
            self.A_im.copy_(math.pi * torch.arange(self.A_im.shape[0], device=self.A_im.device))
            nn.init.normal_(self.C, std=0.5**0.5, generator=generator)
            nn.init.ones_(self.D)

    def system(self) -> System:
        """The system now."""
        if self.log_step.dtype.itemsize < 4:
            raise RunError(
                f"the parameters of a state-space model arrive in {self.log_step.dtype}, in which they are another system; "
                f"keep its module out of mixed precision, e.g. fully_shard(module, mp_policy=MixedPrecisionPolicy()) for each S4D"
            )
        return discretise(self.log_step, self.A_re, self.A_im, self.C, self.D)

    def forward(
        self,
        u_BSD: Tensor,
        *,
        form: Convolution,
        segments_BS: Tensor | None = None,
        reverse: bool = False,
        state: State | None = None,
        same_BS: Tensor | None = None,
    ) -> Tensor:
        """y of every position from those before it (`reverse`: after it) in its segment, in the type of the input.

        Args:
            state: of earlier positions, which those of the input follow; brought forward. Not with `reverse`.
            same_BS: bool, positions in the segment of the state. None: all.
        """
        with torch.autocast(u_BSD.device.type, enabled=False):
            exact_BSD = u_BSD.to(self.D.dtype)
            if state is None:
                y_BSD = convolve(exact_BSD, self.system(), form=form, segments_BS=segments_BS, reverse=reverse)
            else:
                y_BSD = self._read_on(exact_BSD, state, form=form, segments_BS=segments_BS, same_BS=same_BS)
            return y_BSD.to(u_BSD.dtype)

    def _read_on(self, u_BSD: Tensor, state: State, *, form: Convolution, segments_BS: Tensor | None, same_BS: Tensor | None) -> Tensor:
        if state.step is None:
            state.step = Step.of(self.system(), self.D.dtype)
        if u_BSD.shape[1] == 1:
            return state.advance(u_BSD, same_BS)
        return state.advance_many(u_BSD, self.system(), form=form, segments_BS=segments_BS, same_BS=same_BS)


# ---------------------------------------------------------------------------------------------------------------- convolution


def convolve(u_BSD: Tensor, system: System, *, form: Convolution, segments_BS: Tensor | None, reverse: bool) -> Tensor:
    """Causal convolution with the kernel, or with time reversed; [B, S, D] in the input's type.

    `auto` takes the Fourier transform wherever a row is one document: as fast as a matrix product at 128 positions, and 1.7 to 2.4 times as
    fast as the best form of one from 512 to 4096 (CPU, experiments/benchmarks/bigs.py). On packed rows there is no choice.
    """
    size = u_BSD.shape[1]
    if segments_BS is None and form != Convolution.chunked:
        return fft_convolution(u_BSD, system.response(size).to(u_BSD.dtype), reverse)
    if size <= WHOLE_UP_TO:
        return toeplitz_convolution(u_BSD, system, segments_BS=segments_BS, reverse=reverse)
    if not reverse:
        return chunked_convolution(u_BSD, system, segments_BS=segments_BS)
    flipped_BS = None if segments_BS is None else segments_BS.flip(1)
    return chunked_convolution(u_BSD.flip(1), system, segments_BS=flipped_BS).flip(1)


def toeplitz(kernel_P: Tensor) -> Tensor:
    """[P, P]: kernel[i − j] at (i, j), 0 above the diagonal."""
    index = torch.arange(kernel_P.shape[0], device=kernel_P.device)
    lag = index[:, None] - index[None, :]
    return torch.where(lag >= 0, kernel_P[lag.clamp(min=0)], 0.0)


def toeplitz_convolution(u_BSD: Tensor, system: System, *, segments_BS: Tensor | None, reverse: bool) -> Tensor:
    """One matrix product over all positions."""
    matrix_SS = toeplitz(system.response(u_BSD.shape[1]).to(u_BSD.dtype))
    if reverse:
        matrix_SS = matrix_SS.T
    if segments_BS is None:
        return matrix_SS @ u_BSD
    return torch.where(segments_BS[:, :, None] == segments_BS[:, None, :], matrix_SS, 0.0) @ u_BSD


def chunked_convolution(u_BSD: Tensor, system: System, *, segments_BS: Tensor | None) -> Tensor:
    """Toeplitz products inside chunks, and a state that is handed from chunk to chunk. Linear in the length."""
    size, dtype = u_BSD.shape[1], u_BSD.dtype
    chunks = -(-size // CHUNK)
    u_BCPD = F.pad(u_BSD, (0, 0, 0, chunks * CHUNK - size)).unflatten(1, (chunks, CHUNK))
    segments_BCP = None
    if segments_BS is not None:
        segments_BCP = F.pad(segments_BS, (0, chunks * CHUNK - size), value=-2).unflatten(1, (chunks, CHUNK))
    inside_PP = toeplitz(system.response(CHUNK).to(dtype))
    written_BCPD = u_BCPD
    if segments_BCP is not None:
        inside_PP = torch.where(segments_BCP[..., :, None] == segments_BCP[..., None, :], inside_PP, 0.0)
        written_BCPD = u_BCPD * (segments_BCP == segments_BCP[..., -1:])[..., None]
    states_BCXD = _states_between(system.write_in(CHUNK).to(dtype) @ written_BCPD, system, segments_BCP)
    ages = torch.arange(1, CHUNK + 1, device=u_BSD.device)
    carried_BCPD = system.read_out(ages).to(dtype) @ states_BCXD
    if segments_BCP is not None:
        before_BC1 = F.pad(segments_BCP[:, :-1, -1:], (0, 0, 1, 0), value=-3)
        carried_BCPD = carried_BCPD * (segments_BCP == before_BC1)[..., None]
    return (inside_PP @ u_BCPD + carried_BCPD).flatten(1, 2)[:, :size]


def _states_between(written_BCXD: Tensor, system: System, segments_BCP: Tensor | None) -> Tensor:
    """The state before each chunk, [B, C, 2M, D], from what each chunk writes."""
    over = system.powers(torch.full((1,), CHUNK, device=written_BCXD.device))
    factor = Pair(over.re.T.to(written_BCXD.dtype), over.im.T.to(written_BCXD.dtype))
    state = Pair(*torch.zeros_like(written_BCXD[:, 0]).chunk(2, dim=1))
    states = []
    for chunk, written_BXD in enumerate(written_BCXD.unbind(1)):
        states.append(torch.cat(state, dim=1))
        state = state.times(factor)
        if segments_BCP is not None and chunk > 0:
            goes_on_B11 = (segments_BCP[:, chunk, -1] == segments_BCP[:, chunk - 1, -1])[:, None, None]
            state = Pair(state.re * goes_on_B11, state.im * goes_on_B11)
        re, im = written_BXD.chunk(2, dim=1)
        state = Pair(state.re + re, state.im + im)
    return torch.stack(states, dim=1)


# ----------------------------------------------------------------------------------------------------------------- recurrence


class Step(NamedTuple):
    """One step of the recurrence as tensors of the state's type."""

    factor: Pair
    """e^λ, [M, 1]."""
    read_12M: Tensor
    """Output from the state after the step."""
    D: Tensor
    """Output from the input."""

    @classmethod
    def of(cls, system: System, dtype: torch.dtype) -> Step:
        """The step of a system."""
        one = system.powers(torch.ones(1, device=system.rate.re.device))
        read = system.read_out(torch.zeros(1, device=system.rate.re.device))
        return cls(Pair(one.re.T.to(dtype), one.im.T.to(dtype)), read.to(dtype), system.D.to(dtype))


class State:
    """The state of one system for a batch of sequences, [B, 2M, D] (real parts, then imaginary ones), changed in place."""

    def __init__(self, rows: int, modes: int, width: int, *, like: Tensor) -> None:
        self.values_BXD = torch.zeros(rows, 2 * modes, width, device=like.device, dtype=like.dtype)
        self.step: Step | None = None
        """Made when it is first needed: the weights must not change between reading and reading on."""

    def advance(self, u_B1D: Tensor, same_B1: Tensor | None) -> Tensor:
        """One position."""
        assert self.step is not None
        if same_B1 is not None:
            self.values_BXD *= same_B1[:, :, None]
        re, im = self.values_BXD.chunk(2, dim=1)
        factor = self.step.factor
        new_re = torch.addcmul(u_B1D, factor.re, re).addcmul_(factor.im, im, value=-1)
        im.mul_(factor.re).addcmul_(factor.im, re)
        re.copy_(new_re)
        return torch.addcmul(self.step.read_12M @ self.values_BXD, u_B1D, self.step.D)

    def advance_many(
        self, u_BSD: Tensor, system: System, *, form: Convolution, segments_BS: Tensor | None, same_BS: Tensor | None
    ) -> Tensor:
        """Several positions: the convolution among them, and what they see of the state."""
        size, dtype = u_BSD.shape[1], u_BSD.dtype
        ages = torch.arange(1, size + 1, device=u_BSD.device)
        seen_BSD = system.read_out(ages).to(dtype) @ self.values_BXD
        y_BSD = convolve(u_BSD, system, form=form, segments_BS=segments_BS, reverse=False)
        written_BSD = u_BSD if segments_BS is None else u_BSD * (segments_BS == segments_BS[:, -1:])[:, :, None]
        after = system.powers(torch.full((1,), size, device=u_BSD.device))
        old = Pair(*self.values_BXD.chunk(2, dim=1)).times(Pair(after.re.T.to(dtype), after.im.T.to(dtype)))
        kept_BXD = torch.cat(old, dim=1)
        if same_BS is not None:
            seen_BSD, kept_BXD = seen_BSD * same_BS[:, :, None], kept_BXD * same_BS[:, -1:, None]
        self.values_BXD = kept_BXD + system.write_in(size).to(dtype) @ written_BSD
        return y_BSD + seen_BSD
