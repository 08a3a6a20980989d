"""A native model as one module: backbone and head, with the names of weights that checkpoints of this package have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heads_lightning.batch import PADDING, Attention, Batch
from heads_lightning.conversion.families import NativeModel
from heads_lightning.conversion.mapping import ConversionError, listed


class NativeLM(nn.Module):
    """Backbone and head of a NativeModel.

    Args:
        model: what they are.
        device: where parameters are made; on meta they have shapes alone.
    """

    def __init__(self, model: NativeModel, *, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.backbone = model.backbone.build(vocab_size=model.vocab_size, init_device=device)
        embedding = self.backbone.embedding if model.head.is_tied else None
        self.head = model.head.build(d_model=self.backbone.d_model, vocab_size=model.vocab_size, init_device=device, embedding=embedding)

    def forward(
        self,
        tokens_BS: Tensor,
        mask_BS: Tensor | None = None,
        *,
        attention: Attention = Attention.causal,
        encoder_tokens_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V].

        Args:
            tokens_BS: int64 ids; the decoder's, where there is an encoder.
            mask_BS: 1 for tokens, 0 for padding, as transformers has it; the encoder's, where there is one. None: no padding.
            attention: how positions see each other.
            encoder_tokens_BT: what the encoder reads.
        """
        segments_BS = None if mask_BS is None else torch.where(mask_BS.bool(), 0, PADDING)
        if encoder_tokens_BT is not None:
            batch = Batch(tokens_BS, tokens_BS, attention, 0, 0, torch.zeros_like(tokens_BS))
            batch = batch._replace(encoder_tokens_BT=encoder_tokens_BT, encoder_segments_BT=segments_BS)
            return self.head(self.backbone(batch))
        return self.head(self.backbone(Batch(tokens_BS, tokens_BS, attention, 0, 0, segments_BS=segments_BS)))


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
