"""Learning values: what a value is a target of (`objective=value`), and the head that scores one (`head=value`).

The two stand together because a loss over values needs both: the objective says which number each position must reach and how far off
it is counted, the head has as many outputs as that loss needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.base import LayerNormConfig
from heads_lightning.configs.head import HeadConfig, LMLossImplementation, heads
from heads_lightning.configs.objective import ObjectiveConfig, objectives
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from heads_lightning.objectives.base import Vocabulary


class ValueAlignment(StrEnum):
    """Which token the score at a position is about."""

    state_before_action = "state_before_action"
    """The next token, which the position has not read: a critic's V(s) before the action (PPO)."""
    after_token = "after_token"
    """The token at the position itself: verifiers, step labels, reward at the end."""


class ValueTarget(StrEnum):
    """Which number a token's score must reach."""

    given = "given"
    """The record's `returns`, one a token."""
    monte_carlo = "monte_carlo"
    """Discounted sum of the rewards from the token on: gae with lam=1, which needs no `old_values`."""
    gae = "gae"
    """λ-return of `rewards` and `old_values` (generalised advantage estimation, arXiv 1506.02438, plus the old values)."""
    outcome = "outcome"
    """The record's `outcome`, the same for every token (or `step_labels` at the steps' ends)."""


class ValueLoss(StrEnum):
    """How far off a score is counted."""

    mse = "mse"
    """½(v − R)²."""
    clipped_mse = "clipped_mse"
    """½ max((v − R)², (clip(v, v_old ± clip) − R)²) (PPO2). Needs `old_values`."""
    huber = "huber"
    """Quadratic up to huber_delta, linear beyond."""
    bce = "bce"
    """Cross-entropy of sigmoid(score) with a target in 0 to 1; the value is the probability."""
    hl_gauss = "hl_gauss"
    """Cross-entropy over num_bins bins with a Gaussian around the target (arXiv 2403.03950); the value is the mean over the bins."""
    bradley_terry = "bradley_terry"
    """−log sigmoid(chosen − rejected − margin) of pairs, at the last token of each."""


class ValuePositions(StrEnum):
    """Which tokens of a sequence have a target."""

    all = "all"
    """Every token of the mask."""
    last = "last"
    """The last token of the mask alone: a reward model, as AutoModelForSequenceClassification reads it."""


class ValueReduction(StrEnum):
    """What the loss is a mean over: always over the whole optimizer step, all ranks and micro-batches."""

    token_mean = "token_mean"
    """Tokens with a target."""
    seq_mean_token_sum = "seq_mean_token_sum"
    """Sequences; within one, the sum over its tokens."""
    seq_mean_token_mean = "seq_mean_token_mean"
    """Sequences; within one, the mean over its tokens."""


@objectives.register("value")
@dataclass
class ValueConfig(ObjectiveConfig):
    """Score tokens: critics, verifiers, reward models. Reads records (data=jsonl, parquet), or tells intact snippets from corrupted ones.

    With data=jsonl or parquet a record has `text` or `input_ids` and what the target needs. With any other data the documents
    are the material of an example that needs no download: in half of their snippets some tokens are replaced, and the outcome is 1 for the
    others.
    """

    predicts: ClassVar[str] = "value"

    name: str = "value"
    alignment: ValueAlignment = ValueAlignment.after_token
    """Which token the score at a position is about."""
    target: ValueTarget = ValueTarget.outcome
    """Which number it must reach."""
    positions: ValuePositions = ValuePositions.all
    """Which tokens have a target."""
    loss: ValueLoss = ValueLoss.mse
    """How far off a score is counted."""
    reduction: ValueReduction = ValueReduction.token_mean
    """What the loss is a mean over."""
    gamma: float = 1.0
    """Discount per token, 0 to 1 (gae, monte_carlo)."""
    lam: float = 0.95
    """λ of gae, 0 to 1: 0 is one step ahead, 1 the whole return."""
    clip: float = 0.2
    """Furthest a score may move from old_values before the loss stops rewarding it (clipped_mse)."""
    huber_delta: float = 1.0
    """Where huber turns from quadratic to linear."""
    num_bins: int = 51
    """Bins of hl_gauss."""
    value_min: float = 0.0
    """Least value: left end of hl_gauss and of the reliability picture. Values beyond it count in the end bin."""
    value_max: float = 1.0
    """Largest value: their right end."""
    centre: float = 0.0
    """Weight of (chosen + rejected)², which keeps scores of bradley_terry near zero (arXiv 2312.09244). Typical: 0.01."""
    bidirectional: bool = False
    """Read the whole sequence before scoring. Not with state_before_action, which must not see the token that it is about."""
    corruption_rate: float = 0.15
    """Without records: share of a corrupted snippet's tokens that are replaced by ones drawn from the vocabulary."""
    snippet_tokens: int = 32
    """Without records: tokens of a snippet, at most; a window holds several, which do not see each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("gamma", "lam"):
            self.require(0 <= getattr(self, field) <= 1, field, "0 to 1")
        for field in ("clip", "huber_delta"):
            self.require(getattr(self, field) > 0, field, "more than 0")
        self.require(self.num_bins >= 2, "num_bins", "2 or more")
        self.require(self.value_max > self.value_min, "value_max", f"more than objective.value_min={self.value_min}")
        self.require(self.centre >= 0, "centre", "0 or more")
        self.require(0 < self.corruption_rate <= 1, "corruption_rate", "more than 0, up to 1")
        self.require(self.snippet_tokens >= 2, "snippet_tokens", "2 or more")
        if problem := self._contradiction():
            raise ConfigError(problem)
        # of this config, not of the class: what validation compares with the backbone
        self.attention = Attention.bidirectional if self.bidirectional else Attention.causal  # pyright: ignore[reportAttributeAccessIssue]

    def _contradiction(self) -> str | None:
        """What of this config cannot hold together."""
        if self.bidirectional and self.alignment == ValueAlignment.state_before_action:
            return (
                "objective.alignment=state_before_action scores a token before it is read, and objective.bidirectional=true reads it; "
                "use objective.alignment=after_token or objective.bidirectional=false"
            )
        if self.loss == ValueLoss.bradley_terry and self.alignment == ValueAlignment.state_before_action:
            return "objective.loss=bradley_terry compares whole sequences; use objective.alignment=after_token"
        if self.loss == ValueLoss.bradley_terry and self.reduction != ValueReduction.token_mean:
            return (
                f"objective.reduction={self.reduction} has no meaning for pairs; use objective.reduction=token_mean (the mean over pairs)"
            )
        if self.loss == ValueLoss.bce and (self.value_min, self.value_max) != (0.0, 1.0):
            return "objective.loss=bce scores probabilities; leave objective.value_min=0 and objective.value_max=1"
        return None

    @property
    def needs_records(self) -> str:
        """The setting that no example without records can serve; empty when there is none."""
        if self.loss == ValueLoss.clipped_mse:
            return "objective.loss=clipped_mse"
        return f"objective.target={self.target}" if self.target in (ValueTarget.given, ValueTarget.gae) else ""

    @property
    def num_outputs(self) -> int:
        """Outputs of the head a position."""
        return self.num_bins if self.loss == ValueLoss.hl_gauss else 1

    @property
    def pairwise(self) -> bool:
        """A target is a pair of sequences."""
        return self.loss == ValueLoss.bradley_terry

    @property
    def per_sequence(self) -> bool:
        """The loss is a mean over sequences."""
        return self.reduction != ValueReduction.token_mean

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.value import Value

        return Value(self, vocabulary)


class ValueInit(StrEnum):
    """How the scoring layer starts."""

    default = "default"
    """As torch.nn.Linear, bias included."""
    normal = "normal"
    """Normal with init_std, bias 0."""
    reward = "reward"
    """Normal with standard deviation 1/sqrt(d_model + 1), bias 0 (InstructGPT's reward models)."""
    zero = "zero"
    """All 0: every first score is 0."""


@heads.register("value")
@dataclass
class ValueHeadConfig(HeadConfig):
    """A score a position: dropout, an optional hidden layer, one linear layer; fp32 whatever the precision of the rest."""

    predicts: ClassVar[str] = "value"

    name: str = "value"
    dropout: float = 0.0
    """Dropout before the score, in training alone."""
    init: ValueInit = ValueInit.zero
    """How the scoring layer starts."""
    init_std: float = 0.2
    """Standard deviation of init=normal."""
    bias: bool = True
    """Learned offset of the score."""
    hidden_dim: int | None = None
    """Width of a hidden layer (ReLU) before the score. None: no such layer."""
    layer_norm: LayerNormConfig | None = None
    """Norm applied to the hidden states first. None: none here (the backbones end in their own)."""
    detach_trunk: bool = False
    """Train the head alone: no gradient of the score reaches the backbone."""
    lm_weight: float = 0.0
    """Weight of a language-model loss at the positions that have a target, with the same divisor; 0: no such loss and no projection."""
    tie_embeddings: bool = False
    """Use the backbone's embedding matrix as the projection of that loss."""
    loss_implementation: LMLossImplementation = LMLossImplementation.default
    """How that loss is computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.dropout < 1, "dropout", "0 <= dropout < 1")
        self.require(self.init_std > 0, "init_std", "more than 0")
        self.require(self.hidden_dim is None or self.hidden_dim >= 1, "hidden_dim", "1 or more, or null")
        self.require(self.lm_weight >= 0, "lm_weight", "0 or more")
        if self.tie_embeddings and not self.lm_weight:
            raise ConfigError(
                "head.tie_embeddings=true has no projection to tie without a language-model loss; set e.g. head.lm_weight=1.0"
            )

    def build(
        self,
        *,
        d_model: int,
        vocab_size: int = 0,
        init_device: torch.device | str = "cpu",
        embedding: nn.Embedding | None = None,
        objective: ValueConfig | None = None,
    ) -> Any:
        """The module. `objective` says how scores are judged (None: its defaults); vocab_size is needed with lm_weight."""
        from heads_lightning.heads.value import ValueHead

        return ValueHead(
            self, d_model=d_model, vocab_size=vocab_size, init_device=init_device, embedding=embedding, objective=objective or ValueConfig()
        )

    def num_params(self, d_model: int, vocab_size: int, *, num_outputs: int = 1) -> int:
        """Learned numbers of the head; a tied projection counts as the embedding's."""
        norm = self.layer_norm.num_params(d_model) if self.layer_norm else 0
        width = self.hidden_dim or d_model
        hidden = (d_model + 1) * self.hidden_dim if self.hidden_dim else 0
        projection = d_model * vocab_size if self.lm_weight and not self.tie_embeddings else 0
        return norm + hidden + width * num_outputs + (num_outputs if self.bias else 0) + projection
