"""A native model as one module: backbone and head, with the names of weights that checkpoints of this package have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heads_lightning.batch import PADDING, Attention, Batch
from heads_lightning.configs.head import LMHeadConfig
from heads_lightning.configs.value import ValueHeadConfig
from heads_lightning.conversion.families import NativeModel
from heads_lightning.conversion.mapping import ConversionError, listed
from heads_lightning.heads.value import ValueHead


class NativeLM(nn.Module):
    """Backbone and head of a NativeModel.

    Args:
        model: what they are.
        device: where parameters are made; on meta they have shapes alone.
    """

    def __init__(self, model: NativeModel, *, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.backbone = model.backbone.build(vocab_size=model.vocab_size, init_device=device)
        where = {"d_model": self.backbone.d_model, "vocab_size": model.vocab_size, "init_device": device}
        where |= {"embedding": self.backbone.embedding if model.head.is_tied else None}
        if isinstance(model.head, ValueHeadConfig):
            self.head = model.head.build(**where, objective=model.objective)
        else:
            assert isinstance(model.head, LMHeadConfig)
            self.head = model.head.build(**where)

    def forward(
        self,
        tokens_BS: Tensor,
        mask_BS: Tensor | None = None,
        *,
        attention: Attention = Attention.causal,
        encoder_tokens_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V], or the outputs of a value head [B, S, K].

        Args:
            tokens_BS: int64 ids; the decoder's, where there is an encoder.
            mask_BS: 1 for tokens, 0 for padding, as transformers has it; the encoder's, where there is one. None: no padding.
            attention: how positions see each other.
            encoder_tokens_BT: what the encoder reads.
        """
        return self.head(self.hidden(tokens_BS, mask_BS, attention=attention, encoder_tokens_BT=encoder_tokens_BT))

    def hidden(self, tokens_BS: Tensor, mask_BS: Tensor | None, *, attention: Attention, encoder_tokens_BT: Tensor | None = None) -> Tensor:
        """What the head reads, [B, S, D]. Arguments as in forward."""
        segments_BS = None if mask_BS is None else torch.where(mask_BS.bool(), 0, PADDING)
        if encoder_tokens_BT is not None:
            batch = Batch(tokens_BS, tokens_BS, attention, 0, 0, torch.zeros_like(tokens_BS))
            batch = batch._replace(encoder_tokens_BT=encoder_tokens_BT, encoder_segments_BT=segments_BS)
            return self.backbone(batch)
        return self.backbone(Batch(tokens_BS, tokens_BS, attention, 0, 0, segments_BS=segments_BS))

    def keeps_type(self, name: str) -> bool:
        """Whether a weight is never stored in a type below its own: a recurrence, or a value's last layers."""
        if name.startswith("head."):
            return isinstance(self.head, ValueHead) and not name.startswith("head.lm_head.")
        return name.rpartition(".")[2] in self.backbone.dynamics


def check_shapes(model: NativeModel, shapes: Mapping[str, torch.Size | tuple[int, ...]], *, trunk_only: bool = False) -> None:
    """Refuse weights that are not exactly those of the model, by name and shape.

    Raises:
        ConversionError: a weight would be left at its random initialisation, has no place, or has another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in NativeLM(model, device="meta").state_dict().items()}
    if trunk_only:
        expected = {name: shape for name, shape in expected.items() if name.startswith("backbone.")}
    got = {name: tuple(shape) for name, shape in shapes.items()}
    problems = []
    if absent := expected.keys() - got.keys():
        problems.append(f"left at random initialisation: {listed(absent)}")
    if surplus := got.keys() - expected.keys():
        problems.append(f"without a place in the native model: {listed(surplus)}")
    if wrong := [f"{n} {list(got[n])} instead of {list(expected[n])}" for n in expected.keys() & got.keys() if got[n] != expected[n]]:
        problems.append(f"of another shape: {listed(wrong)}")
    if problems:
        raise ConversionError("; ".join(problems))
