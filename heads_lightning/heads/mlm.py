"""`head=mlm`: BERT's head (Devlin et al., arXiv 1810.04805): dense layer, activation, norm, then the projection with a bias."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads_lightning.configs.base import LayerNormConfig
from heads_lightning.heads.base import LMHead
from heads_lightning.heads.layers import Device, TiedLinear, build_norm, projection_std, reset_linear, reset_norm
from heads_lightning.losses import Projection

if TYPE_CHECKING:
    from heads_lightning.configs.head import MLMHeadConfig

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu}


class MLMHead(LMHead):
    """logits = softcap(norm(activation(dense(hidden))) @ weight.T + bias). Only positions with a target pass through the dense layer.

    Args:
        config: what the head is; without layer_norm, the norm is an RMS norm.
        d_model: width of the hidden states.
        vocab_size: classes that can be predicted.
        init_device: where parameters are made; `meta` leaves them to to_empty and reset_parameters.
        embedding: the token embedding, with tie_embeddings.
    """

    def __init__(
        self,
        config: MLMHeadConfig,
        *,
        d_model: int,
        vocab_size: int,
        init_device: Device = "cpu",
        embedding: nn.Embedding | None = None,
    ) -> None:
        super().__init__(config, d_model=d_model, vocab_size=vocab_size)
        dtype = getattr(torch, config.dtype)
        self.dense = nn.Linear(d_model, d_model, bias=config.dense_bias, device=init_device, dtype=dtype)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = build_norm(config.layer_norm or LayerNormConfig(), d_model, init_device, dtype)
        self.w_out = TiedLinear(config, d_model, vocab_size, init_device)
        self.initialise(init_device, embedding)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights (see projection_std), zero biases, norm of scale one."""
        std = projection_std(self.d_model)
        reset_linear(self.dense, std, generator)
        reset_linear(self.w_out, std, generator)
        reset_norm(self.norm)

    def prepare(self, hidden: Tensor) -> Tensor:
        """Dense layer, activation, norm."""
        # in the norm's own precision: under bf16 autocast the dense layer hands over bf16, which mixes kinds and slows the norm
        return self.norm(self.activation(self.dense(hidden)).to(self.dense.weight.dtype))

    def projection(self) -> Projection:
        """The matrix as it is."""
        return Projection(self.w_out.matrix(), self.w_out.bias, self.config.logit_softcap, self.vocab_size)

    def num_matmul_params(self) -> int:
        """The dense layer and the matrix."""
        return self.d_model * self.d_model + self.d_model * self.vocab_size
