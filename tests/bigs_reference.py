"""BiGS by its definition, for the tests: complex arithmetic, flips and names as published, as slowly as it reads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heads_lightning.backbones.ssm import S4D
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.layers import CausalForm, Direction

VOCAB = 61
TINY = BiGSBackboneConfig(d_model=16, num_layers=2, inner_dim=24, state_size=8, max_positions=64)
CAUSAL = replace(TINY, direction=Direction.causal)
FORMS = {form.value: replace(CAUSAL, causal_form=form) for form in CausalForm}


def system_of(modes: int = 64, seed: int = 0, log_step: float = math.log(0.05), dtype: torch.dtype = torch.float64) -> S4D:
    made = S4D(modes)
    made.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.log_step.fill_(log_step)
        made.A_re.mul_(torch.linspace(0.5, 2.0, modes))
        made.D.fill_(0.7)
    return made.to(dtype)


def system_cast(system: S4D) -> S4D:
    """A copy in fp64."""
    made = S4D(system.A_re.shape[0])
    made.load_state_dict(system.state_dict())
    return made.double()


def modes_of(system: S4D) -> tuple[Tensor, Tensor, Tensor]:
    """λ and the gain of each mode, complex, as the paper has them; and dt·A."""
    A = torch.complex(system.A_re.clamp(max=-1e-4), system.A_im)
    C = torch.complex(system.C[:, 0], system.C[:, 1])
    rate = A * system.log_step.exp()
    return rate, C * (torch.exp(rate) - 1) / A, A


def complex_kernel(system: S4D, length: int) -> Tensor:
    rate, gain, _ = modes_of(system)
    powers = torch.exp(rate[:, None] * torch.arange(length))
    return (gain[:, None] * powers).sum(0).real


def direct_sum(u_BSD: Tensor, kernel: Tensor) -> Tensor:
    pieces = [torch.einsum("s,bsd->bd", kernel[: t + 1].flip(0), u_BSD[:, : t + 1]) for t in range(u_BSD.shape[1])]
    return torch.stack(pieces, 1)


def recurrence(u_BSD: Tensor, system: S4D) -> Tensor:
    rate, gain, _ = modes_of(system)
    x, pieces = torch.zeros(u_BSD.shape[0], rate.shape[0], u_BSD.shape[2], dtype=torch.complex128), []
    for u_BD in u_BSD.unbind(1):
        x = x * torch.exp(rate)[:, None] + u_BD[:, None]
        pieces.append((gain[:, None] * x).sum(1).real)
    return torch.stack(pieces, 1)


def reference_block(block: Any, x_BSD: Tensor, direction: str, form: str) -> Tensor:
    """One block with flips and direct sums, in the gate's own activation."""
    h, flip = block.norm(x_BSD), direction == "bidirectional"

    def run(system: S4D, u: Tensor) -> Tensor:
        return direct_sum(u, complex_kernel(system, u.shape[1])) + system.D * u

    gate = block.gate
    f = block.forward_out(run(block.forward_system, gate(block.forward_in(h))))
    if direction == "causal" and form == "single":
        mixed = f
    else:
        ub = gate(block.backward_in(h.flip(1) if flip else h))
        if flip or form != "gate":
            ub = run(block.backward_system, ub)
        b = block.backward_out(ub)
        mixed = f * (b.flip(1) if flip else b)
    return x_BSD + block.output(gate(block.expand(mixed)) * gate(block.value(h)))
