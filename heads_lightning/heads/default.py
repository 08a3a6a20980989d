"""`head=default`: one linear projection, with an optional norm before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from heads_lightning.heads.base import LMHead
from heads_lightning.heads.layers import Device, TiedLinear, build_norm, projection_std, reset_linear, reset_norm
from heads_lightning.losses import Projection

if TYPE_CHECKING:
    from heads_lightning.configs.head import DefaultLMHeadConfig


class DefaultLMHead(LMHead):
    """logits = softcap(norm(hidden) @ weight.T + bias).

    With steps_ahead, step j is predicted from hidden + silu(hidden @ W_j.T), W_j zero at first: the projection is shared (Medusa's
    residual block, arXiv 2401.10774, section 2.1.1, trained from the beginning as in arXiv 2404.19737).

    Args:
        config: what the head is.
        d_model: width of the hidden states.
        vocab_size: classes that can be predicted.
        init_device: where parameters are made; `meta` leaves them to to_empty and reset_parameters.
        embedding: the token embedding, with tie_embeddings; it may have more rows than vocab_size, which are never predicted.
    """

    def __init__(
        self,
        config: DefaultLMHeadConfig,
        *,
        d_model: int,
        vocab_size: int,
        init_device: Device = "cpu",
        embedding: nn.Embedding | None = None,
    ) -> None:
        super().__init__(config, d_model=d_model, vocab_size=vocab_size)
        dtype = getattr(torch, config.dtype)
        self.norm = None if config.layer_norm is None else build_norm(config.layer_norm, d_model, init_device, dtype)
        self.steps_ahead = config.steps_ahead
        blocks = (nn.Linear(d_model, d_model, bias=False, device=init_device, dtype=dtype) for _ in range(config.steps_ahead))
        self.ahead = nn.ModuleList(blocks)
        self.w_out = TiedLinear(config, d_model, vocab_size, init_device)
        self.initialise(init_device, embedding)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights (see projection_std), zero bias, norm of scale one; every step ahead begins as the next one."""
        reset_linear(self.w_out, projection_std(self.d_model), generator)
        if self.norm is not None:
            reset_norm(self.norm)
        for block in self.ahead:
            nn.init.zeros_(block.weight)  # pyright: ignore[reportArgumentType]

    def look_ahead(self, hidden: Tensor) -> Tensor:
        """The hidden states, then those of every step ahead."""
        return torch.cat([hidden, *(hidden + nn.functional.silu(block(hidden)) for block in self.ahead)], dim=1)

    def prepare(self, hidden: Tensor) -> Tensor:
        """The norm, where there is one."""
        return hidden if self.norm is None else self.norm(hidden)

    def projection(self) -> Projection:
        """The matrix as it is."""
        return Projection(self.w_out.matrix(), self.w_out.bias, self.config.logit_softcap, self.vocab_size)

    def num_matmul_params(self) -> int:
        """The matrix, once for every step, and the layers of the steps ahead."""
        return (1 + self.steps_ahead) * self.d_model * self.vocab_size + self.steps_ahead * self.d_model**2
