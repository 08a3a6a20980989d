"""`head=normalized`: nGPT's head (Loshchilov et al., arXiv 2410.01131, section 2.3.1).

Rows of the matrix have unit norm, so that with normalised hidden states the products are cosines; a learned scale per vocabulary entry
turns them into logits. The scale multiplies the rows of the weight, so every loss implementation takes the head as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from heads_lightning.heads.base import LMHead
from heads_lightning.heads.layers import Device, projection_std, reset_linear
from heads_lightning.losses import Projection

if TYPE_CHECKING:
    from heads_lightning.configs.head import NormalizedLMHeadConfig


class NormalizedLMHead(LMHead):
    """logits = softcap(scale · (hidden @ weight.T)), rows of weight of unit norm, scale = sz·√d_model.

    Args:
        config: what the head is.
        d_model: width of the hidden states.
        vocab_size: classes that can be predicted.
        init_device: where parameters are made; `meta` leaves them to to_empty and reset_parameters.
    """

    def __init__(self, config: NormalizedLMHeadConfig, *, d_model: int, vocab_size: int, init_device: Device = "cpu") -> None:
        super().__init__(config, d_model=d_model, vocab_size=vocab_size)
        dtype = getattr(torch, config.dtype)
        self.w_out = nn.Linear(d_model, vocab_size, bias=False, device=init_device, dtype=dtype)
        self.sz = nn.Parameter(torch.empty(vocab_size, device=init_device, dtype=dtype))
        self.initialise(init_device)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random rows of unit norm; a scale of one."""
        reset_linear(self.w_out, projection_std(self.d_model), generator)
        self.sz.fill_(self.d_model**-0.5)  # kept at the size of the weights, so that one learning rate suits both
        self.normalize_matrices()

    def projection(self) -> Projection:
        """Rows times their scale."""
        scale_V = self.sz * self.d_model**0.5
        return Projection(self.w_out.weight * scale_V.unsqueeze(1), None, self.config.logit_softcap, self.vocab_size)

    @torch.no_grad()
    def normalize_matrices(self) -> None:
        """Divide each row by its norm, taken in fp32. A row of zeros stays."""
        weight_VD = self.w_out.weight
        norm_V1 = torch.linalg.vector_norm(weight_VD, dim=1, keepdim=True, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        weight_VD.copy_(weight_VD / norm_V1.clamp(min=torch.finfo(norm_V1.dtype).tiny))

    def after_optimizer_step(self) -> None:
        """An update leaves the sphere; return to it."""
        self.normalize_matrices()

    def num_matmul_params(self) -> int:
        """The matrix."""
        return self.d_model * self.vocab_size
