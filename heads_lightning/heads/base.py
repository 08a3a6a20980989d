"""What a head is: hidden states to a score. `LMHead.forward` is final; heads differ in `projection` and `prepare` alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn


class Head(nn.Module, ABC):
    """Interface of every head, over a vocabulary or not."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise every own parameter and buffer in place: also after building on meta and to_empty. Tied weights are the backbone's."""

    def after_optimizer_step(self) -> None:
        """Restore what an update breaks (normalized: unit rows). Called by the trainer after each optimizer step."""
