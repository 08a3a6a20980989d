"""`head=value`: a score a position: dropout, an optional hidden layer, one linear layer.

The head is an fp32 island: its parameters stay fp32 under `.to(bf16)` and Lightning's bf16-true, and autocast is off inside, because a
value's error is judged absolutely and bf16 keeps three digits. Hidden states without a target are zeroed before the first layer, so that
what stands there (NaN included) reaches neither the loss nor a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from heads_lightning.batch import IGNORE, Batch
from heads_lightning.configs.head import DefaultLMHeadConfig
from heads_lightning.configs.value import ValueConfig, ValueHeadConfig, ValueInit
from heads_lightning.heads.base import Head, HeadLoss
from heads_lightning.heads.default import DefaultLMHead
from heads_lightning.heads.layers import Device, build_norm, reset_norm
from heads_lightning.losses.value import ValueStatistics, ValueTargets, decode, value_losses, value_statistics


class ValueHead(Head):
    """outputs = summary(dropout(hidden)), [B, S, K] in fp32.

    Args:
        config: what the head is. Or a configuration of transformers: then `summary_dropout_prob`, `v_head_initializer_range` and
            `v_head_init_strategy` are the other arguments, and d_model is read from it.
        d_model: width of the hidden states.
        vocab_size: classes of the joint language-model loss (lm_weight).
        init_device: where parameters are made; `meta` leaves them to to_empty and reset_parameters.
        embedding: the token embedding, with tie_embeddings.
        objective: how scores are judged; None: the defaults of objective=value.
        huggingface: the other arguments of the second form.

    Raises:
        ValueError: an initialisation that does not exist, two dropouts, a configuration without a width.
    """

    def __init__(
        self,
        config: ValueHeadConfig | Any,
        *,
        d_model: int | None = None,
        vocab_size: int = 0,
        init_device: Device = "cpu",
        embedding: nn.Embedding | None = None,
        objective: ValueConfig | None = None,
        **huggingface: Any,
    ) -> None:
        super().__init__()
        if not isinstance(config, ValueHeadConfig):
            config, d_model = from_huggingface(config, **huggingface)
        elif huggingface:
            raise TypeError(f"ValueHead has no argument {', '.join(huggingface)}; ValueHeadConfig has the fields of a head")
        assert d_model is not None, "ValueHead(ValueHeadConfig(...)) needs d_model"
        self.config, self.d_model, self.objective = config, d_model, objective or ValueConfig()
        where = {"device": init_device, "dtype": torch.float32}
        self.norm = None if config.layer_norm is None else build_norm(config.layer_norm, d_model, init_device, torch.float32)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.hidden = None if config.hidden_dim is None else nn.Linear(d_model, config.hidden_dim, **where)
        self.summary = nn.Linear(config.hidden_dim or d_model, self.objective.num_outputs, bias=config.bias, **where)
        self.lm_head = _lm_head(config, d_model, vocab_size, init_device, embedding) if config.lm_weight else None
        if torch.device(init_device).type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise as config.init says; the hidden layer and `default` as torch.nn.Linear does."""
        if self.norm is not None:
            reset_norm(self.norm)
        if self.hidden is not None:
            _reset_linear(self.hidden, generator)
        if self.lm_head is not None:
            self.lm_head.reset_parameters(generator)
        if self.config.init == ValueInit.default:
            return _reset_linear(self.summary, generator)
        std = {ValueInit.normal: self.config.init_std, ValueInit.reward: (self.summary.in_features + 1) ** -0.5}.get(self.config.init, 0.0)
        self.summary.weight.normal_(0.0, std, generator=generator)
        if self.summary.bias is not None:
            self.summary.bias.zero_()

    def forward(self, hidden: Tensor, batch: Batch | None = None, divisor: float | None = None) -> Tensor | HeadLoss:
        """Outputs fp32 [B, S, K] (K = 1 but for hl_gauss); with a batch, its loss (see Head.loss)."""
        if batch is None:
            return self._outputs(hidden)
        targets = _targets(batch)
        hidden = torch.where(targets.mask_BS.unsqueeze(-1), hidden, 0.0)
        outputs_BSK = self._outputs(hidden)
        losses_BS, clipped_BS = value_losses(outputs_BSK, targets, self.objective)
        if batch.weights_BS is not None:
            losses_BS = losses_BS * batch.weights_BS
        sums = {} if clipped_BS is None else {"clipped": clipped_BS.sum()}
        if self.lm_head is not None:
            lm_losses_BS = self._lm_losses(hidden, batch)
            losses_BS = losses_BS + self.config.lm_weight * lm_losses_BS
            sums["lm_loss"] = lm_losses_BS.detach().sum()
        if divisor is None:
            return HeadLoss(losses_BS, sums, value_statistics(outputs_BSK, targets, self.objective))
        total = losses_BS.sum()
        return HeadLoss(total / divisor, sums | {"loss": total.detach()})

    def values(self, hidden: Tensor) -> Tensor:
        """fp32 [B, S]: the value at each position (of bce a probability, of hl_gauss the mean over the bins)."""
        outputs_BSK = self(hidden)
        assert isinstance(outputs_BSK, Tensor)
        return decode(outputs_BSK, self.objective)

    def loss(self, hidden_BSD: Tensor, batch: Batch, *, divisor: float | None) -> HeadLoss:
        found = self(hidden_BSD, batch, divisor)  # the call, so that hooks of sharded strategies run
        assert isinstance(found, HeadLoss)
        return found

    @property
    def num_statistics(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Numbers in HeadLoss.statistics."""
        return ValueStatistics.size()

    def metrics(self, statistics: list[float]) -> dict[str, float]:
        return ValueStatistics.from_vector(statistics).metrics()

    def tie(self, embedding: nn.Embedding) -> None:
        """Use the weight of `embedding` as the projection of the joint language-model loss."""
        if self.lm_head is None:
            raise ValueError("head=value has a projection only with head.lm_weight above 0")
        self.lm_head.tie(embedding)

    def _outputs(self, hidden: Tensor) -> Tensor:
        hidden = hidden.detach() if self.config.detach_trunk else hidden
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.float()
            if self.norm is not None:
                x = self.norm(x)
            x = self.dropout(x)
            if self.hidden is not None:
                x = _linear(self.hidden, x).relu()
            return _linear(self.summary, x)

    def _lm_losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        assert self.lm_head is not None
        output = self.lm_head(hidden, labels=batch.labels_BS, weights=batch.weights_BS, loss_reduction="none", return_logits=False)
        return output.loss

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueHead:
        """Moves go through, a narrower type does not: see the module's first lines."""

        def stays_exact(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrower = moved.is_floating_point() and moved.element_size() < tensor.element_size()
            return tensor.to(moved.device) if narrower else moved

        return super()._apply(stays_exact, recurse)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in fp32: a sharded strategy may hand its weight over in bf16."""
    bias = None if layer.bias is None else layer.bias.float()
    return nn.functional.linear(x.float(), layer.weight.float(), bias)


def _reset_linear(layer: nn.Linear, generator: torch.Generator | None) -> None:
    """As torch.nn.Linear.reset_parameters, from a generator."""
    bound = layer.in_features**-0.5
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _lm_head(config: ValueHeadConfig, d_model: int, vocab_size: int, device: Device, embedding: nn.Embedding | None) -> DefaultLMHead:
    tied = DefaultLMHeadConfig(tie_embeddings=config.tie_embeddings, bias=False, loss_implementation=config.loss_implementation)
    return DefaultLMHead(tied, d_model=d_model, vocab_size=vocab_size, init_device=device, embedding=embedding)


def _targets(batch: Batch) -> ValueTargets:
    if batch.values_BS is None:
        raise ValueError("head=value needs a batch with values: objective=value makes them")
    return ValueTargets(batch.labels_BS != IGNORE, batch.values_BS, batch.old_values_BS)


# -- configurations of transformers --------------------------------------------------------------------------------------

DEFAULT_DROPOUT = 0.1
"""Of a head around a model of transformers, where nothing is said."""


def from_huggingface(
    config: Any,
    *,
    summary_dropout_prob: float | None = ...,  # pyright: ignore[reportArgumentType]
    v_head_initializer_range: float = 0.2,
    v_head_init_strategy: str | None = None,
) -> tuple[ValueHeadConfig, int]:
    """Our config and the width, for a configuration of transformers and the keywords of its value heads.

    The dropout stands in the configuration or in the keyword; two that differ are refused. None and 0 are none; unsaid is 0.1.
    """
    stands, given = getattr(config, "summary_dropout_prob", ...), summary_dropout_prob
    if stands is not ... and given is not ... and (stands or 0) != (given or 0):
        raise ValueError(f"summary_dropout_prob={given}, but the model's config says {stands}; leave one of them out")
    chosen = given if stands is ... else stands
    dropout = DEFAULT_DROPOUT if chosen is ... else (chosen or 0.0)
    if v_head_init_strategy not in (None, "normal"):
        raise ValueError(f"v_head_init_strategy={v_head_init_strategy!r} does not exist; use None (torch.nn.Linear's) or 'normal'")
    init = ValueInit.default if v_head_init_strategy is None else ValueInit.normal
    return ValueHeadConfig(dropout=float(dropout), init=init, init_std=v_head_initializer_range), hidden_width(config)


def hidden_width(config: Any) -> int:
    """Width of the last hidden state of a model with this configuration of transformers."""
    for owner, name in (
        (config, "word_embed_proj_dim"),  # OPT 350m projects back to the width of its embedding
        (config, "hidden_size"),
        (getattr(config, "text_config", None), "hidden_size"),
        (getattr(config, "decoder", None), "hidden_size"),
    ):
        if isinstance(width := getattr(owner, name, None), int):
            return width
    raise ValueError(f"{type(config).__name__} says no width (hidden_size); the value head cannot be sized")
