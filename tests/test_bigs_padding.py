"""BiGS: padding is invisible, and packed documents do not see each other (B11, B12)."""

from __future__ import annotations

import itertools

import pytest
import torch
from bigs_reference import CAUSAL, TINY, system_of

from heads_lightning.backbones import ssm
from heads_lightning.batch import PADDING, Attention
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.layers import Convolution
from heads_lightning.testing.backbones import batch_of, draw_tokens, enlarged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("config", [TINY, CAUSAL], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(config: BiGSBackboneConfig, side: str) -> None:
    model, real, pads = enlarged(config, dtype=torch.float32, gain=6.0), draw_tokens(2, 20), draw_tokens(2, 12, seed=3)
    tokens = torch.cat((pads, real) if side == "left" else (real, pads), 1)
    content = slice(12, 32) if side == "left" else slice(0, 20)
    segments = torch.full_like(tokens, PADDING)
    segments[:, content] = 0
    attention = Attention(config.direction.value)
    with torch.no_grad():
        alone = model(batch_of(real, attention))
        hidden = model(batch_of(tokens, attention, segments_BS=segments))[:, content]
        blind = model(batch_of(tokens, attention))[:, content]
    assert (hidden - alone).abs().max() < 1e-4
    if side == "left" or config is TINY:  # the control: without the mask, padding shows
        assert (blind - alone).abs().max() > 1e-2


@pytest.mark.parametrize("form", [Convolution.auto, Convolution.fft, Convolution.chunked])
@pytest.mark.parametrize("size", [24, 700])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_documents_do_not_see_each_other(form: Convolution, size: int, reverse: bool) -> None:
    """Short rows are one chunk, long ones many; borders lie inside chunks and at their ends."""
    system, generator = system_of(), torch.Generator().manual_seed(0)
    u = torch.randn(2, size, 3, generator=generator, dtype=torch.float64)
    borders = [0, 7, 12, size] if size < 100 else [0, 5, 128, 256, 256 + 300, 690, size]
    segments = torch.zeros(2, size, dtype=torch.int32)
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        segments[:, start:end] = number if number % 3 else PADDING
    y = ssm.convolve(u, system.system(), form=form, segments_BS=segments, reverse=reverse)
    for start, end in itertools.pairwise(borders):
        part = ssm.convolve(u[:, start:end], system.system(), form=Convolution.fft, segments_BS=None, reverse=reverse)
        torch.testing.assert_close(y[:, start:end], part, rtol=1e-10, atol=1e-10)
