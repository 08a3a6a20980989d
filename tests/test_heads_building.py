"""Heads as they are built: options, sizes, initialisation, ties, dtypes, FLOPs, compilation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from head_batches import HEADS, LOSSES, B, D, S, V, build, inputs
from torch import nn
from torch.nn import functional as F

from heads_lightning import LMHeadConfig, LMHeadType, LMLossImplementation
from heads_lightning.configs.base import LayerNormConfig, NormType
from heads_lightning.heads import DefaultLMHead
from heads_lightning.registry import ConfigError
from heads_lightning.testing.base import assert_near

# --- construction ---------------------------------------------------------------------------------------------------------------


def test_types_names_and_defaults() -> None:
    """Case A1, and the enums' members are the registry's options."""
    assert {member.value for member in LMHeadType} <= set(HEADS)
    assert isinstance(LMHeadConfig().build(d_model=D, vocab_size=V), DefaultLMHead)
    assert LMHeadConfig().build(d_model=D, vocab_size=V).w_out.bias is not None
    assert LMHeadConfig(bias=False).build(d_model=D, vocab_size=V).w_out.bias is None
    assert LMHeadConfig().loss_implementation == "default"
    for kwargs in ({"bias": True}, {"bias": False}, {"layer_norm": LayerNormConfig()}):
        with pytest.raises(ConfigError, match="head=normalized"):
            LMHeadConfig(name=LMHeadType.normalized, **kwargs)
    with pytest.raises(ConfigError, match="available: default, chunked"):
        LMHeadConfig(loss_implementation="bogus")  # pyright: ignore[reportArgumentType]
    for kwargs in ({"d_model": 0, "vocab_size": V}, {"d_model": D, "vocab_size": 0}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            LMHeadConfig().build(**kwargs)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("norm", [None, NormType.rms, NormType.layer_norm])
@pytest.mark.parametrize("bias", [None, True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_num_params_is_what_is_built(name: str, norm: NormType | None, bias: bool | None, tied: bool) -> None:
    """Case A7; refused combinations are refused by the config."""
    layer_norm = None if norm is None else LayerNormConfig(name=norm, bias=True)
    try:
        config = LMHeadConfig(name=name, layer_norm=layer_norm, bias=bias, tie_embeddings=tied)
    except ConfigError:
        assert name == "normalized"
        return
    embedding = nn.Embedding(V, D) if tied else None
    head = config.build(d_model=D, vocab_size=V, embedding=embedding)
    assert sum(p.numel() for p in head.parameters()) == config.num_params(D, V)
    x, labels = inputs()
    head(x, labels=labels).loss.backward()
    assert embedding is None or embedding.weight.grad is not None


@pytest.mark.parametrize("name", HEADS)
def test_meta_then_materialised_equals_built_here(name: str) -> None:
    config = LMHeadConfig(name=name, layer_norm=None if name == "normalized" else LayerNormConfig(bias=True))
    here = config.build(d_model=D, vocab_size=V)
    there = config.build(d_model=D, vocab_size=V, init_device="meta")
    assert {p.device.type for p in there.parameters()} == {"meta"}
    there = there.to_empty(device="cpu")
    for parameter in there.parameters():
        nn.init.constant_(parameter, torch.nan)
    for head in (here, there):
        head.reset_parameters(torch.Generator().manual_seed(3))
    for (key, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("d_model", [64, 4096])
def test_a_new_head_is_nearly_uniform(name: str, d_model: int) -> None:
    torch.manual_seed(0)
    head = LMHeadConfig(name=name, loss_implementation=LMLossImplementation.chunked).build(d_model=d_model, vocab_size=500)
    x = torch.randn(1, 64, d_model)
    if name == "normalized":
        x = F.normalize(x, dim=-1)
    loss = float(head(x, labels=torch.randint(0, 500, (1, 64))).loss.detach())
    assert abs(loss - math.log(500)) < 0.25, loss  # 0.125 of variance (layers.projection_std) and sampling noise


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("implementation", ["default", "chunked"])
def test_dtype_of_parameters_logits_and_loss(dtype: str, implementation: str) -> None:
    head = LMHeadConfig(dtype=dtype, loss_implementation=implementation).build(d_model=D, vocab_size=V)  # pyright: ignore[reportArgumentType]
    kind = getattr(torch, dtype)
    x, labels = inputs()
    assert {p.dtype for p in head.parameters()} == {kind}
    assert head(x.to(kind)).dtype == kind
    assert head(x.to(kind), labels=labels).loss.dtype == (torch.float64 if dtype == "float64" else torch.float32)


# --- tied embeddings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HEADS if name != "normalized"])
def test_a_tie_survives_materialising_copying_and_padding(name: str) -> None:
    """Case A9. The embedding has more rows than the vocabulary: padding, never predicted."""
    config = LMHeadConfig(name=name, tie_embeddings=True, loss_implementation=LMLossImplementation.chunked)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(V + 11, D, device="meta")
            self.head = config.build(d_model=D, vocab_size=V, init_device="meta", embedding=self.embedding)

    model = Model().to_empty(device="cpu")
    model.head.reset_parameters()
    nn.init.normal_(model.embedding.weight)
    for each in (model, copy.deepcopy(model)):
        x, labels = inputs()
        each.head(x, labels=labels).loss.backward()
        assert each.head.projection().weight_VD is each.embedding.weight
        assert each.embedding.weight.grad[:V].any()
        assert not each.embedding.weight.grad[V:].any()
        assert each.head(x).shape == (B, S, V)
        assert sum("embedding" in key for key in each.state_dict()) == 1
        assert "head.w_out.weight" not in each.state_dict()


def test_ties_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="head=normalized"):
        LMHeadConfig(name="normalized", tie_embeddings=True)
    tied = LMHeadConfig(tie_embeddings=True)
    with pytest.raises(ValueError, match="cannot be the projection"):
        tied.build(d_model=D, vocab_size=V, embedding=nn.Embedding(V, D + 1))
    with pytest.raises(ValueError, match="cannot be the projection"):
        tied.build(d_model=D, vocab_size=V, embedding=nn.Embedding(V - 1, D))
    with pytest.raises(RuntimeError, match=r"head\.tie"):
        tied.build(d_model=D, vocab_size=V)(inputs()[0])
    with pytest.raises(ValueError, match="tie_embeddings=true"):
        LMHeadConfig().build(d_model=D, vocab_size=V, embedding=nn.Embedding(V, D))


# --- nGPT -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", LOSSES)
def test_normalized_rows_return_to_the_sphere(implementation: str) -> None:
    """Case A8, and a row of zeros stays finite."""
    torch.manual_seed(0)
    head = LMHeadConfig(name="normalized", loss_implementation=implementation).build(d_model=D, vocab_size=V)
    ones = torch.ones(V)
    torch.testing.assert_close(head.w_out.weight.norm(dim=1), ones)
    torch.testing.assert_close(head.sz * math.sqrt(D), ones)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    x, labels = inputs()
    head(x, labels=labels).loss.backward()
    optimizer.step()
    assert not torch.allclose(head.w_out.weight.norm(dim=1), ones)
    scale = head.sz.detach().clone()
    head.after_optimizer_step()
    torch.testing.assert_close(head.w_out.weight.norm(dim=1), ones)
    assert torch.equal(head.sz, scale)
    with torch.no_grad():
        head.w_out.weight[7] = 0
    head.normalize_matrices()
    assert head.w_out.weight.isfinite().all()
    assert not head.w_out.weight[7].any()


# --- compiled, counted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_flops_equal_the_counter(name: str) -> None:
    """Case A6: within 2 % of PyTorch's counter, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    head = build(name, d_model=64, vocab_size=512)
    x = torch.randn(2, 16, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        head(x, labels=torch.randint(0, 512, (2, 16))).loss.backward()
    counted = counter.get_total_flops() / 32
    assert abs(head.num_flops_per_token(16) - counted) < 0.02 * counted


COMPILED = [
    pytest.param(name, implementation, static, marks=() if (name, implementation, static) == ("mlm", "chunked", True) else pytest.mark.slow)
    for name in HEADS
    for implementation in ("default", "chunked", "auto")
    for static in (False, True)
]


@pytest.mark.parametrize(("name", "implementation", "static_rows"), COMPILED)
def test_compiled_without_a_graph_break_equals_eager(
    name: str, implementation: str, static_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aot_eager traces, differentiates and functionalises as inductor does, without generating code."""
    monkeypatch.setattr("heads_lightning.losses.targets.STATIC_ROWS", 8)
    torch._dynamo.reset()
    head = build(name, implementation, z_loss_multiplier=1e-2, label_smoothing=0.1)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    x, labels = inputs(0.6)
    for options in ({}, {"loss_reduction": "sum", "loss_div_factor": 3.0}, {"loss_reduction": "none"}, {"token_metrics": True}):
        if static_rows:
            options = {**options, "num_targets": int((labels != -100).sum())}
        results = []
        for module in (head, compiled):
            head.zero_grad()
            h = x.clone().requires_grad_()
            out = module(h, labels=labels, return_logits=False, **options)
            out.loss.sum().backward()
            results.append([*out[1:], h.grad, *(p.grad for p in head.parameters())])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


def test_zero_z_loss_overrides_the_config_and_counts_are_of_all_positions() -> None:
    """0.0 is off, whatever the config says (and not "unset"); num_targets describes the labels given, not those that are kept."""
    head = build("default", "chunked", z_loss_multiplier=1e-2)
    x, labels = inputs()
    off = head(x, labels=labels, z_loss_multiplier=0.0)
    assert off.z_loss is None
    torch.testing.assert_close(off.loss, off.ce_loss)
    assert head(x, labels=labels).z_loss > 0
    kept = head(x, labels=labels, logits_to_keep=4, num_targets=int((labels != -100).sum()))
    torch.testing.assert_close(kept.loss, head(x[:, -4:], labels=labels[:, -4:]).loss)


@pytest.mark.parametrize("implementation", ["default", "chunked"])
@pytest.mark.parametrize("name", HEADS)
def test_autocast_gives_fp32_losses_and_gradients_in_the_types_of_parameters(name: str, implementation: str) -> None:
    """1 %: operands and products are bf16, with 8 bits of mantissa."""
    head = build(name, implementation)
    x, labels = inputs()
    exact = head(x, labels=labels, return_logits=False)
    exact.loss.backward()
    want = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = head(x, labels=labels, return_logits=False)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert_near(out.loss, exact.loss, 1e-2, "loss")
    for parameter, grad in zip(head.parameters(), want, strict=True):
        assert parameter.grad.dtype == parameter.dtype
        assert_near(parameter.grad, grad, 2e-2, parameter.shape)
