"""Backbones as they are built: sizes, FLOPs, initialisation, gradients, compilation."""

from __future__ import annotations

import math

import pytest
import torch
from backbone_variants import VARIANTS, VOCAB, any_attention, build, config
from torch import nn

from heads_lightning.testing.backbones import batch_of as batch
from heads_lightning.testing.backbones import draw_tokens as tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


# ---- sizes, initialisation, gradients


def test_num_params_is_exact(variant: str) -> None:
    described = config(variant)
    for vocab_size in (VOCAB, 100):
        model = described.build(vocab_size=vocab_size, init_device="meta")
        assert sum(p.numel() for p in model.parameters()) == described.num_params(vocab_size)


def test_num_flops_counts_the_matrix_products(variant: str) -> None:
    """6 operations per weight of a linear layer and token (forward 2, backward 4), attention as the PaLM paper counts it."""
    from torch.utils.flop_counter import FlopCounterMode

    described, size = config(variant), 16
    model = described.build(vocab_size=VOCAB)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(batch(tokens(2, size), any_attention(variant))).sum().backward()
    # the hidden states of the first layer need a gradient too (the embedding learns), so nothing is left out of the count
    counted, said = counter.get_total_flops(), described.num_flops_per_token(size) * 2 * size
    # BiGS: its kernel is a product too, shared by all rows and channels, so that no count per token holds it
    assert said <= counted <= said * (1.02 if variant.startswith("bigs") else 1.0)


def test_meta_and_direct_builds_are_equal_and_deterministic(variant: str) -> None:
    described = config(variant)
    direct = described.build(vocab_size=VOCAB)
    late = described.build(vocab_size=VOCAB, init_device="meta")
    assert all(p.is_meta for p in (*late.parameters(), *late.buffers()))
    late.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*late.parameters(), *late.buffers()):
            tensor.fill_(math.nan)
    for model in (direct, late):
        model.reset_parameters(torch.Generator().manual_seed(3))
    assert direct.state_dict().keys() == late.state_dict().keys()
    for name, value in direct.state_dict().items():
        assert torch.equal(value, late.state_dict()[name]), name
        assert value.isfinite().all(), name
    late.reset_parameters(torch.Generator().manual_seed(4))
    assert not torch.equal(direct.embedding.weight, late.embedding.weight)


def test_hidden_states_are_sane_at_the_start(variant: str) -> None:
    model = config(variant).build(vocab_size=VOCAB)
    hidden = model(batch(tokens(4, 16), any_attention(variant)))
    expected = 32**-0.5 if variant.startswith("ngpt") else 1.0
    assert hidden.square().mean().sqrt().item() == pytest.approx(expected, rel=0.05)


def test_gradients_reach_every_parameter(variant: str) -> None:
    model = build(variant, torch.float32, gain=2.0).train()
    one = torch.arange(VOCAB).repeat(2)[: 3 * 40].view(3, 40)
    (model(batch(one, any_attention(variant))) * torch.randn(32, generator=torch.Generator().manual_seed(0))).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_parameters_are_matrices_or_vectors(variant: str) -> None:
    """Optimizers decide by shape: 2-D inside the blocks is a matrix, 1-D is a norm, bias or scale."""
    model = config(variant).build(vocab_size=VOCAB, init_device="meta")
    parameters = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] not in model.dynamics}
    assert {p.ndim for p in parameters.values()} <= {1, 2}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear == {n for n, p in parameters.items() if p.ndim == 2 and n.startswith("blocks.")}
    assert not list(model.buffers())
