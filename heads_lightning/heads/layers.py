"""What several heads are made of: the norm, and the projection with or without a matrix of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from heads_lightning.configs.base import NormType

if TYPE_CHECKING:
    from heads_lightning.configs.base import LayerNormConfig
    from heads_lightning.configs.head import LMHeadConfig

Device = torch.device | str
MAX_STD = 0.02


def build_norm(config: LayerNormConfig, d_model: int, device: Device, dtype: torch.dtype) -> nn.Module:
    """The norm that a config describes."""
    if config.name == NormType.rms:
        return nn.RMSNorm(d_model, eps=config.eps, device=device, dtype=dtype)
    return nn.LayerNorm(d_model, eps=config.eps, bias=config.bias, device=device, dtype=dtype)


def reset_norm(norm: nn.Module) -> None:
    """Scale one, shift zero."""
    assert isinstance(norm, (nn.RMSNorm, nn.LayerNorm))
    norm.reset_parameters()


def projection_std(d_model: int) -> float:
    """Standard deviation of a new projection: 0.02 (GPT-2, BERT), less for a width above 625.

    Hidden states of unit root mean square give logits of variance d·std², and a first loss of ln V + d·std²/2. With 0.02 alone that excess
    is 0.8 nats at d = 4096; with at most 0.5/√d it is at most 0.125 at any width.
    """
    return min(MAX_STD, 0.5 * d_model**-0.5)


@torch.no_grad()
def reset_linear(linear: nn.Linear, std: float, generator: torch.Generator | None) -> None:
    """Normal weights, unless they are someone else's; zero bias."""
    if linear.weight is not None:
        linear.weight.normal_(0.0, std, generator=generator)
    if linear.bias is not None:
        linear.bias.zero_()


class TiedLinear(nn.Linear):
    """A projection whose weight may be an embedding's.

    The tied weight is read through the embedding and is no parameter here. So it is saved, sharded and updated once, under the backbone's
    name, and no way of materialising a model (to_empty, meta, loading) can cut the tie.
    """

    def __init__(self, config: LMHeadConfig, d_model: int, vocab_size: int, device: Device) -> None:
        dtype = getattr(torch, config.dtype)
        super().__init__(d_model, 1 if config.is_tied else vocab_size, bias=False, device=device, dtype=dtype)
        self.out_features = vocab_size
        self._embedding: tuple[nn.Embedding, ...] = ()  # in a tuple, so that it is not registered as a child
        self.is_tied = config.is_tied
        if self.is_tied:
            self.register_parameter("weight", None)
        if config.has_bias:
            self.bias = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype))

    def tie(self, embedding: nn.Embedding) -> None:
        """Use the weight of `embedding` from now on."""
        if not self.is_tied:
            raise ValueError("a head is tied only with head.tie_embeddings=true")
        if embedding.embedding_dim != self.in_features or embedding.num_embeddings < self.out_features:
            raise ValueError(
                f"an embedding [{embedding.num_embeddings}, {embedding.embedding_dim}] cannot be the projection "
                f"[{self.out_features}, {self.in_features}]; head.tie_embeddings=false learns a separate one"
            )
        self._embedding = (embedding,)

    def matrix(self) -> Tensor:
        """[V, D]: the own weight, or the embedding's."""
        if self._embedding:
            return self._embedding[0].weight
        if self.weight is None:
            raise RuntimeError("head.tie_embeddings=true: give build(embedding=...) or call head.tie(embedding) before the head is used")
        return self.weight

    @property
    def rows(self) -> int:
        """Rows of the matrix, padding of a tied embedding included."""
        return self._embedding[0].num_embeddings if self._embedding else self.out_features
