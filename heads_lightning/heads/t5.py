"""`head=t5`: T5's projection. Tied or not, with or without a bias, after T5 v1.0's scale of 1/√d_model or without it: all by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from heads_lightning.heads.base import LMHead
from heads_lightning.heads.layers import Device, TiedLinear, build_norm, projection_std, reset_linear, reset_norm
from heads_lightning.losses import Projection

if TYPE_CHECKING:
    from heads_lightning.configs.t5 import T5LMHeadConfig


class T5Head(LMHead):
    """logits = softcap(hidden · d_model^-0.5 @ weight.T + bias), the scale by option.

    Args:
        config: what the head is.
        d_model: width of the hidden states.
        vocab_size: classes that can be predicted.
        init_device: where parameters are made; `meta` leaves them to to_empty and reset_parameters.
        embedding: the token embedding, when tied; it may have more rows than vocab_size, which are never predicted.
    """

    def __init__(
        self,
        config: T5LMHeadConfig,
        *,
        d_model: int,
        vocab_size: int,
        init_device: Device = "cpu",
        embedding: nn.Embedding | None = None,
    ) -> None:
        super().__init__(config, d_model=d_model, vocab_size=vocab_size)
        dtype = getattr(torch, config.dtype)
        self.norm = None if config.layer_norm is None else build_norm(config.layer_norm, d_model, init_device, dtype)
        self.w_out = TiedLinear(config, d_model, vocab_size, init_device)
        self.scale = d_model**-0.5 if config.scales else 1.0
        self.loss_dtype: torch.dtype = getattr(torch, config.loss_dtype)
        self.initialise(init_device, embedding)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights that make up for the scale, so that a new model begins near ln V with or without it; zero bias."""
        reset_linear(self.w_out, projection_std(self.d_model) / self.scale, generator)
        if self.norm is not None:
            reset_norm(self.norm)

    def prepare(self, hidden: Tensor) -> Tensor:
        """The norm where there is one, the scale, the loss's type."""
        normed = hidden if self.norm is None else self.norm(hidden)
        return self._in_loss_dtype(normed if self.scale == 1.0 else normed * self.scale)

    def projection(self) -> Projection:
        """The matrix and bias in the loss's type."""
        return self.projection_of(self.w_out.matrix())

    def projection_of(self, weight_VD: Tensor) -> Projection:
        """The projection with another matrix: of a tied head whose embedding lies elsewhere."""
        bias_V = self.w_out.bias
        return Projection(
            self._in_loss_dtype(weight_VD),
            None if bias_V is None else self._in_loss_dtype(bias_V),
            self.config.logit_softcap,
            self.vocab_size,
        )

    def num_matmul_params(self) -> int:
        """The matrix."""
        return self.d_model * self.vocab_size

    def _in_loss_dtype(self, x: Tensor) -> Tensor:
        is_least = self.loss_dtype in (torch.float32, torch.float64)
        return x.to(torch.promote_types(x.dtype, self.loss_dtype) if is_least else self.loss_dtype)
