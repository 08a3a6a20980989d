"""What a backbone is: tokens in, hidden states out, with the attention that the batch asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from heads_lightning.batch import Attention, Batch


class Cache(ABC):
    """Keys, values or states of the positions read so far, for generation. Made by Backbone.new_cache, changed by Backbone.forward."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions held."""


class TensorRole(Enum):
    """What a module does where several devices compute a sequence together (training/tensor_parallel.py gives it its weights)."""

    columns = auto()
    """Linear or embedding: each device has some of its outputs (heads, inner features)."""
    rows = auto()
    """Linear: each device has some of its inputs, and their products are summed."""
    vocabulary = auto()
    """Embedding of tokens: each device has some of its rows, and what it finds is summed."""
    positions = auto()
    """Works on each position by itself (norm, table of positions): each device does some of the positions."""
    reads_all = auto()
    """Its first input is gathered: it reads every position and is made of columns and rows."""
    heads = auto()
    """Norm over the last dimension of [B, S, H, E]: each device has some of the heads."""


class Backbone(nn.Module, ABC):
    """Interface of every backbone. Leaves implement the abstract methods; none overrides a working one."""

    supports: ClassVar[frozenset[Attention]]
    """Attention kinds that forward understands."""
    dynamics: ClassVar[tuple[str, ...]] = ()
    """Own names of parameters that describe a recurrence (A, dt, C, D of a state-space model). Small changes of them change everything
    after: they are trained at a share of the learning rate (optimizer.dynamics_rate), never decayed, and never handed to Muon."""
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = MappingProxyType({})
    """Roles by pattern of module name; the first that fits counts. A module with weights and without a role works on everything, on every
    device. With a role `positions`, every position-wise part has one. Empty: tensor parallelism is refused while composing."""
    d_model: int
    """Width of the hidden states."""
    embedding: nn.Embedding
    """The token embedding [V, D]; a tied head shares its weight."""

    @abstractmethod
    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Hidden states [B, S, D] after the final norm.

        With a cache, `batch` holds only the new positions. They see what was read before, and each other as the batch asks (causal or
        prefix). Rows of unequal length are padded on the left with segment -1; later batches may leave segments_BS out.
        """

    @property
    def blocks_in_order(self) -> list[nn.Module]:
        """The repeated parts, members of the outermost lists of modules: the unit of sharding, recomputation and compilation."""
        lists = {name: module for name, module in self.named_modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)}
        outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        return [block for name in outermost for block in lists[name].children()]

    @property
    def exact_modules(self) -> list[nn.Module]:
        """Parts of blocks that compute in float32 or better from weights in float32, whatever the precision around them."""
        return []

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter and buffer in place: also after building on meta and to_empty."""

    @abstractmethod
    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache on the device and in the type of the parameters."""

    def after_optimizer_step(self) -> None:
        """Restore what an update breaks (nGPT: unit norms). Called by the trainer after each optimizer step."""
