"""Every head with every loss implementation: the documented call against formulas written out in fp64, and the life of the parameters.

Tolerances as in test_losses.py.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads_lightning import LMHeadConfig, LMHeadType, LMLossImplementation
from heads_lightning.configs.base import LayerNormConfig, NormType
from heads_lightning.configs.head import LMHeadConfig as AnyConfig
from heads_lightning.configs.head import heads
from heads_lightning.heads import DefaultLMHead, LMHead, LMOutputWithLoss, LMOutputWithMetrics, MLMHead, NormalizedLMHead
from heads_lightning.losses import unavailable
from heads_lightning.registry import ConfigError
from heads_lightning.testing.base import assert_near

HEADS = [name for name, config in heads.items() if issubclass(config, AnyConfig)]
LOSSES = [name.value for name in LMLossImplementation if unavailable(name) is None]
B, S, D, V = 2, 12, 16, 53


def build(name: str, implementation: str = "default", *, d_model: int = D, vocab_size: int = V, **options: Any) -> Any:
    torch.manual_seed(0)
    head = LMHeadConfig(name=name, loss_implementation=implementation, **options).build(d_model=d_model, vocab_size=vocab_size)
    with torch.no_grad():
        for parameter in head.parameters():  # away from the zeros and ones of a new head
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return head


def inputs(masked: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(B, S, D, generator=g), torch.randint(0, V, (B, S), generator=g)
    labels[torch.rand(B, S, generator=g) < masked] = -100
    return x, labels


def logits_by_hand(head: LMHead, x: Tensor) -> Tensor:
    """Each head's formula."""
    p = dict(head.named_parameters())
    if isinstance(head, MLMHead):
        x = F.rms_norm(F.gelu(F.linear(x, p["dense.weight"], p["dense.bias"])), (D,), p["norm.weight"], 1e-5)
    logits = x @ p["w_out.weight"].t()
    logits = p["sz"] * math.sqrt(D) * logits if isinstance(head, NormalizedLMHead) else logits + p.get("w_out.bias", 0.0)
    cap = head.config.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def loss_by_hand(head: LMHead, x: Tensor, labels: Tensor, *, reduction: str, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, z-loss) from torch's own cross_entropy."""
    logits = logits_by_hand(head, x).reshape(-1, V)
    flat, valid = labels.reshape(-1), labels.reshape(-1) != -100
    ce = F.cross_entropy(logits, flat, reduction="none", ignore_index=-100, label_smoothing=head.config.label_smoothing)
    z_loss = z * logits.logsumexp(1) ** 2 * valid
    if reduction == "none":
        ce, z_loss = ce.view(labels.shape), z_loss.view(labels.shape)
    else:
        divide = max(int(valid.sum()), 1) if reduction == "mean" else 1
        ce, z_loss = ce.sum() / divide, z_loss.sum() / divide
    return ce + z_loss, ce, z_loss


@pytest.mark.parametrize("implementation", [name for name in LOSSES if name != "auto"])
@pytest.mark.parametrize("name", HEADS)
def test_matrix_of_heads_losses_and_features(name: str, implementation: str) -> None:
    grid = itertools.product(
        ("mean", "sum", "none"), (0.0, 1e-2), (0.0, 0.1), (None, 3.0), (0.0, 0.4, 2.0), ("", "hidden", "head"), (None, False)
    )
    heads_by_option = {(e, c): build(name, implementation, label_smoothing=e, logit_softcap=c) for e in (0.0, 0.1) for c in (None, 3.0)}
    for number, (reduction, z, smoothing, softcap, masked, frozen, return_logits) in enumerate(grid):
        if z == 0.0 and number % 2:
            z = None  # both are off
        if implementation == "fused_linear" and number % 13 and not torch.cuda.is_available():
            continue  # Triton's interpreter is slow
        what = (reduction, z, smoothing, softcap, masked, frozen, return_logits)
        head = heads_by_option[smoothing, softcap].requires_grad_(frozen != "head")
        head.zero_grad()
        exact = copy.deepcopy(head).double()
        x, labels = inputs(masked)
        x.requires_grad_(frozen != "hidden")
        X = x.detach().double().requires_grad_(frozen != "hidden")
        out = head(x, labels=labels, loss_reduction=reduction, z_loss_multiplier=z, return_logits=return_logits)
        loss, ce, z_loss = loss_by_hand(exact, X, labels, reduction=reduction, z=z or 0.0)
        upstream = torch.arange(1.0, B * S + 1).view(B, S) if reduction == "none" else torch.tensor(0.5)
        out.loss.backward(upstream)
        loss.backward(upstream.double())
        assert out.loss.shape == loss.shape
        assert_near(out.loss, loss, 1e-5, what)
        assert_near(out.ce_loss, ce, 1e-5, what)
        assert (out.z_loss is None) == (not z), what
        assert out.z_loss is None or not out.z_loss.requires_grad
        if z:
            assert_near(out.z_loss, z_loss, 1e-5, what)
        assert (out.logits is not None) == (implementation == "default" and return_logits is None)
        if frozen != "hidden":
            assert_near(x.grad, X.grad, 1e-5, what)
        for (key, got), want in zip(head.named_parameters(), exact.parameters(), strict=True):
            assert (got.grad is None) == (frozen == "head"), (what, key)
            if got.grad is not None:
                assert_near(got.grad, want.grad, 1e-5, (what, key))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("implementation", LOSSES)
def test_rows_without_a_target_are_dropped_before_the_head(name: str, implementation: str) -> None:
    head, seen = build(name, implementation), []
    x, labels = inputs(0.8)
    prepare = type(head).prepare
    head.prepare = lambda hidden: seen.append(hidden.shape) or prepare(head, hidden)
    head(x, labels=labels, return_logits=False)
    assert seen == [(int((labels != -100).sum()), D)]


@pytest.mark.parametrize("implementation", LOSSES)
@pytest.mark.parametrize("name", HEADS)
class TestPositions:
    """logits_to_keep (case A5): each form equals slicing beforehand."""

    def test_each_form_equals_slicing(self, name: str, implementation: str) -> None:
        head = build(name, implementation)
        x, labels = inputs()
        rows = torch.tensor([[3, 1, 1], [0, 11, 5]])
        mask = torch.rand(B, S) < 0.5
        take = torch.arange(B).unsqueeze(1)
        for keep, index in (
            (0, (slice(None), slice(None))),
            (5, (slice(None), slice(-5, None))),
            (99, (slice(None), slice(None))),
            (torch.tensor([4, 2]), (slice(None), [4, 2])),
            (rows, (take, rows)),
            (rows.int(), (take, rows)),
        ):
            torch.testing.assert_close(head(x, logits_to_keep=keep), head(x[index]))
            for reduction in ("mean", "none"):
                got = head(x, labels=labels, logits_to_keep=keep, loss_reduction=reduction)
                want = head(x[index].contiguous(), labels=labels[index].contiguous(), loss_reduction=reduction)
                torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(head(x, logits_to_keep=mask), head(x)[mask])
        got = head(x, labels=labels, logits_to_keep=mask, loss_reduction="sum").loss
        want = head(x, labels=torch.where(mask, labels, -100), loss_reduction="sum").loss
        torch.testing.assert_close(got, want)

    def test_none_kept_is_zero(self, name: str, implementation: str) -> None:
        x, labels = inputs()
        out = build(name, implementation)(x, labels=labels, logits_to_keep=torch.zeros(B, 0, dtype=torch.long))
        assert float(out.loss.detach()) == 0


@pytest.mark.parametrize(
    "keep",
    [
        -1,
        True,
        torch.tensor([-1]),
        torch.tensor([S]),
        torch.tensor(3),
        torch.tensor([1.0]),
        torch.zeros(B + 1, 2).long(),
        torch.ones(S).bool(),
    ],
    ids=str,
)
def test_positions_that_mean_nothing_are_refused(keep: Any) -> None:
    with pytest.raises(ValueError, match="logits_to_keep"):
        build("default")(inputs()[0], logits_to_keep=keep)


@pytest.mark.parametrize("implementation", LOSSES)
@pytest.mark.parametrize("name", HEADS)
def test_logits_on_request_are_part_of_the_graph(name: str, implementation: str) -> None:
    head = build(name, implementation, logit_softcap=5.0)
    x, labels = inputs()
    out = head(x, labels=labels, return_logits=True)
    torch.testing.assert_close(out.logits, logits_by_hand(head, x))
    assert out.logits.requires_grad
    torch.testing.assert_close(out.loss, head(x, labels=labels, return_logits=False).loss)
    torch.testing.assert_close(head(x), out.logits)
    with pytest.raises(RuntimeError, match="return_logits=False without labels"):
        head(x, return_logits=False)


@pytest.mark.parametrize("implementation", LOSSES)
@pytest.mark.parametrize("name", HEADS)
def test_metrics_need_no_logits(name: str, implementation: str) -> None:
    head = build(name, implementation)
    x, labels = inputs()
    plain = head(x, labels=labels)
    assert type(plain) is LMOutputWithLoss
    assert len(plain) == 4
    logits = logits_by_hand(head, x)
    valid = labels != -100
    hits = (logits.argmax(-1) == labels) & valid
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1) * valid
    for return_logits in (False, True):
        out = head(x, labels=labels, token_metrics=True, return_logits=return_logits)
        assert type(out) is LMOutputWithMetrics
        assert float(out.correct) == float(hits.sum())
        torch.testing.assert_close(out.entropy, entropy.sum())
        each = head(x, labels=labels, token_metrics=True, return_logits=return_logits, loss_reduction="none")
        torch.testing.assert_close(each.correct, hits.float())
        torch.testing.assert_close(each.entropy, entropy.detach())


@pytest.mark.parametrize("implementation", LOSSES)
@pytest.mark.parametrize("name", HEADS)
def test_divisors_weights_and_counts(name: str, implementation: str) -> None:
    head = build(name, implementation, z_loss_multiplier=1e-2)
    x, labels = inputs()
    targets = int((labels != -100).sum())
    total = head(x, labels=labels, loss_reduction="sum")
    mean = head(x, labels=labels)
    each = head(x, labels=labels, loss_reduction="none")
    for part in ("loss", "ce_loss", "z_loss"):
        torch.testing.assert_close(getattr(mean, part), getattr(total, part) / targets)
        torch.testing.assert_close(getattr(each, part).sum(), getattr(total, part))
        for factor in (targets, float(targets), torch.tensor(targets), torch.tensor([float(targets)]).squeeze()):
            by_factor = head(x, labels=labels, loss_reduction="sum", loss_div_factor=factor, num_targets=targets)
            torch.testing.assert_close(getattr(by_factor, part), getattr(mean, part))
    torch.testing.assert_close(head(x, labels=labels, loss_div_factor=4.0).loss, mean.loss / 4)
    factors = torch.arange(1.0, B * S + 1).view(B, S)
    torch.testing.assert_close(head(x, labels=labels, loss_reduction="none", loss_div_factor=factors).loss, each.loss / factors)
    weights = torch.rand(B, S)
    torch.testing.assert_close(head(x, labels=labels, weights=weights).loss, (each.loss * weights).sum() / targets)
    torch.testing.assert_close(head(x, labels=labels, weights=weights, return_logits=True).loss, (each.loss * weights).sum() / targets)
    classes = torch.rand(V) + 0.5
    want = F.cross_entropy(logits_by_hand(head, x).view(-1, V), labels.view(-1), weight=classes)
    torch.testing.assert_close(head(x, labels=labels, class_weights=classes).ce_loss, want.detach())


@pytest.mark.parametrize("implementation", LOSSES)
def test_padding_changes_nothing(implementation: str) -> None:
    """Case A2: rows labelled -100 leave loss and z-loss unchanged, summed and averaged."""
    head = build("default", implementation)
    x, labels = inputs(0.0)
    padded_x, padded = torch.cat([x, torch.randn(B, 3, D)], 1), torch.cat([labels, torch.full((B, 3), -100)], 1)
    for reduction in ("mean", "sum"):
        short = head(x, labels=labels, loss_reduction=reduction, z_loss_multiplier=1e-3)[1:]
        long = head(padded_x, labels=padded, loss_reduction=reduction, z_loss_multiplier=1e-3)[1:]
        for a, b in zip(short, long, strict=True):
            assert a.shape == ()
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("implementation", [name for name in LOSSES if name != "default"])
def test_parity_with_default(name: str, implementation: str) -> None:
    """Case A3: d 256, V 1024, z 1e-3, sum over a divisor; every part and every gradient at torch's default tolerances."""
    torch.manual_seed(0)
    x, labels = torch.randn(2, 32, 256), torch.randint(0, 1024, (2, 32))
    labels[0, :9] = -100
    results = []
    for chosen in ("default", implementation):
        head = build(name, chosen, d_model=256, vocab_size=1024)
        h = x.clone().requires_grad_()
        out = head(h, labels=labels, loss_reduction="sum", z_loss_multiplier=1e-3, loss_div_factor=2 * 32)
        out.loss.backward()
        results.append([*out[1:], h.grad, *(p.grad for p in head.parameters())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_labels_are_checked_by_position() -> None:
    x, labels = inputs()
    labels[1, 4] = V
    with pytest.raises(ValueError, match=rf"label {V} at position \(1, 4\) is outside 0\.\.{V - 1}"):
        build("default")(x, labels=labels)
    with pytest.raises(ValueError, match="do not fit"):
        build("default")(x, labels=labels[:, :-1])
    with pytest.raises(ValueError, match="whole numbers"):
        build("default")(x, labels=labels.float())
    with pytest.raises(ValueError, match=r"\[B, S, D\]"):
        build("default")(x[0])
    with pytest.raises(ValueError, match="bogus is not a valid value for reduction"):
        build("default")(x, labels=inputs()[1], loss_reduction="bogus")


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
