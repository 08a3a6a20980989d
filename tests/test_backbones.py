"""Contract of every registered backbone: who sees whom, what a cache and packing must not change, sizes, initialisation.

Leaks are sought in fp64 with enlarged weights: at the usual initialisation a real leak can be smaller than fp32's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads_lightning.backbones import layers
from heads_lightning.backbones.base import Backbone
from heads_lightning.backbones.gelu import gelu_tanh, gelu_tanh_product
from heads_lightning.batch import PADDING, Attention
from heads_lightning.configs.backbone import backbones
from heads_lightning.configs.base import NormType
from heads_lightning.configs.layers import (
    AttentionBias,
    CausalForm,
    Direction,
    FeedForward,
    GateActivation,
    LocalAttention,
    NormPlacement,
    Position,
    QKNormWidth,
    RotaryScaling,
    RotaryScalingType,
)
from heads_lightning.configs.transformer import NGPTConfig, TransformerConfig
from heads_lightning.registry import ConfigError
from heads_lightning.testing.backbones import LEAK, changed_at, enlarged
from heads_lightning.testing.backbones import batch_of as batch
from heads_lightning.testing.backbones import draw_tokens as tokens

VOCAB = 61
TINY: dict[str, dict[str, Any]] = {
    "transformer": {"d_model": 32, "num_layers": 3, "num_heads": 4},
    "ngpt": {"d_model": 32, "num_layers": 3, "num_heads": 4},
    "bigs": {"d_model": 32, "num_layers": 3, "state_size": 8, "max_positions": 64},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "transformer-gqa-qknorm": ("transformer", {"num_kv_heads": 2, "qk_norm": True, "head_dim": 12}),
    "transformer-gpt2": (
        "transformer",
        {"position": "learned", "norm": "layer_norm", "bias": True, "feed_forward": "plain", "activation": "gelu", "max_positions": 40},
    ),
    "transformer-layernorm-nobias": ("transformer", {"norm": "layer_norm", "activation": "relu_squared", "position": "none"}),
    "transformer-bert": (
        "transformer",
        {
            **{
                "position": "learned",
                "norm": "layer_norm",
                "bias": True,
                "feed_forward": "plain",
                "activation": "gelu",
                "max_positions": 40,
            },
            **{"norm_placement": NormPlacement.post, "embedding_norm": True, "token_types": 2},
        },
    ),
    "transformer-modernbert": (
        "transformer",
        {
            **{"norm": "layer_norm", "embedding_norm": True, "activation": "gelu", "rotary_base": 160000.0},
            "local_attention": LocalAttention(window=30, global_layers=[0], rotary_base=10000.0),
        },
    ),
    "transformer-olmo2": (
        "transformer",
        {"norm_placement": NormPlacement.reordered, "qk_norm": True, "qk_norm_width": QKNormWidth.full, "num_kv_heads": 2},
    ),
    "transformer-qwen2-scaled": (
        "transformer",
        {
            **{"attention_bias": AttentionBias.qkv, "num_kv_heads": 2, "embedding_scale": 2.0, "attention_scale": 0.5},
            "rotary_scaling": RotaryScaling(type=RotaryScalingType.yarn, factor=4.0, original_positions=16),
        },
    ),
    "ngpt": ("ngpt", {}),
    "ngpt-gqa": ("ngpt", {"num_kv_heads": 2, "alpha_init": 0.3, "feed_forward_dim": 48}),
    "bigs": ("bigs", {}),
    "bigs-dual": ("bigs", {"direction": "causal"}),
    "bigs-gate": ("bigs", {"direction": "causal", "causal_form": "gate", "position": "none"}),
    "bigs-single": ("bigs", {"direction": "causal", "causal_form": "single", "gate_activation": "gelu", "num_token_types": 0}),
}
ENUMS = {
    "direction": Direction, "causal_form": CausalForm, "gate_activation": GateActivation,
    "position": Position, "norm": NormType, "feed_forward": FeedForward,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small wait for threads more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(variant: str) -> Any:
    name, fields = VARIANTS[variant]
    fields = {k: ENUMS[k](v) if k in ENUMS else v for k, v in fields.items()}
    return backbones[name](**(TINY[name] | fields))


def build(variant: str, dtype: torch.dtype = torch.float64, gain: float = 8.0, seed: int = 0) -> Backbone:
    """See testing.backbones.enlarged."""
    return enlarged(config(variant), VOCAB, dtype, gain, seed)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def variants_with(attention: Attention) -> pytest.MarkDecorator:
    """The variants that give an attention kind."""
    return pytest.mark.parametrize("variant", [v for v in VARIANTS if attention in config(v).attention_supported()])


EACH = [(v, a) for v in VARIANTS for a in sorted(config(v).attention_supported())]
"""Every variant with every attention kind that it gives."""


def any_attention(variant: str) -> Attention:
    """Causal, where the variant gives it."""
    supported = config(variant).attention_supported()
    return Attention.causal if Attention.causal in supported else min(supported)


def rounding(variant: str) -> float:
    """What a change may be where there is none: exactly 0, except for a convolution by Fourier transform."""
    return LEAK if variant.startswith("bigs") else 0.0


def test_every_registered_backbone_is_tested() -> None:
    elsewhere = {"t5", "huggingface", "huggingface_import"}  # with tests of their own
    built_in = {name for name, cls in backbones.items() if cls.__module__.startswith("heads_lightning.")} - elsewhere
    assert built_in == {name for name, _ in VARIANTS.values()}


# ---- who sees whom


@variants_with(Attention.causal)
@pytest.mark.parametrize("packed", [False, True])
def test_causal_never_sees_the_future(variant: str, packed: bool) -> None:
    model, one = build(variant), tokens(2, 24)
    segments = torch.zeros_like(one) if packed else None
    for position in (0, 7, 23):
        other = one.clone()
        other[:, position] = (other[:, position] + 1) % VOCAB
        change = changed_at(model, batch(one, segments_BS=segments), batch(other, segments_BS=segments))
        assert (change[:position] <= rounding(variant)).all()
        assert (change[position:] > 1e-6).all()


@variants_with(Attention.bidirectional)
def test_bidirectional_sees_the_future(variant: str) -> None:
    model, one = build(variant), tokens(2, 24)
    other = one.clone()
    other[:, 20] = (other[:, 20] + 1) % VOCAB
    assert (changed_at(model, batch(one, Attention.bidirectional), batch(other, Attention.bidirectional)) > 1e-6).all()


@variants_with(Attention.prefix)
def test_prefix_sees_itself_whole_and_the_rest_is_causal(variant: str) -> None:
    model, one = build(variant), tokens(2, 24)
    prefix = (torch.arange(24) < 10).expand(2, 24)
    for position, first_changed in ((9, 0), (10, 10), (15, 15)):
        other = one.clone()
        other[:, position] = (other[:, position] + 1) % VOCAB
        change = changed_at(model, batch(one, Attention.prefix, prefix_BS=prefix), batch(other, Attention.prefix, prefix_BS=prefix))
        assert not change[:first_changed].any()
        assert (change[first_changed:] > 1e-6).all()


@variants_with(Attention.prefix)
def test_a_stray_prefix_position_shows_nothing_to_others(variant: str) -> None:
    """Positions outside the prefix never look ahead, not even at prefix positions."""
    model, one = build(variant), tokens(1, 12)
    prefix = torch.zeros(1, 12, dtype=torch.bool)
    prefix[0, [0, 1, 8]] = True
    other = one.clone()
    other[:, 8] = (other[:, 8] + 1) % VOCAB
    change = changed_at(model, batch(one, Attention.prefix, prefix_BS=prefix), batch(other, Attention.prefix, prefix_BS=prefix))
    assert change[0] > 0
    assert not (change[2:8] == 0).all()  # through the prefix, which does look ahead
    single = build(variant)
    single.blocks = single.blocks[:1]  # pyright: ignore
    change = changed_at(single, batch(one, Attention.prefix, prefix_BS=prefix), batch(other, Attention.prefix, prefix_BS=prefix))
    assert not change[2:8].any()


# ---- packing and padding


@pytest.mark.parametrize(("variant", "attention"), EACH)
def test_packed_documents_are_isolated_and_equal_to_themselves_alone(variant: str, attention: Attention) -> None:
    model, one = build(variant), tokens(2, 24)
    lengths = [7, 12, 5]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, 24).int()
    prefix = torch.zeros(2, 24, dtype=torch.bool)
    prefix[:, :3] = prefix[:, 7:12] = True
    packed = batch(one, attention, segments_BS=segments, prefix_BS=prefix)
    other = one.clone()
    other[:, :7] = tokens(2, 7, seed=9)
    change = changed_at(model, packed, packed._replace(tokens_BS=other))
    assert (change[:7] > 0).any()
    assert (change[7:] <= rounding(variant)).all()
    with torch.no_grad():
        whole, start = model(packed), 0
        for length in lengths:
            part = slice(start, start + length)
            alone = model(batch(one[:, part], attention, prefix_BS=prefix[:, part]))
            torch.testing.assert_close(whole[:, part], alone, rtol=1e-9, atol=1e-9)
            start += length


@pytest.mark.parametrize(("variant", "attention"), [(v, a) for v, a in EACH if a != Attention.prefix])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_stays_finite(variant: str, attention: Attention, side: str) -> None:
    model, real, pad = build(variant), tokens(2, 14), tokens(2, 6, seed=3)
    segments = torch.zeros(2, 20, dtype=torch.int32)
    both = (pad, real) if side == "left" else (real, pad)
    padding, content = (slice(0, 6), slice(6, 20)) if side == "left" else (slice(14, 20), slice(0, 14))
    segments[:, padding] = PADDING
    with torch.no_grad():
        hidden = model(batch(torch.cat(both, 1), attention, segments_BS=segments))
        alone = model(batch(real, attention))
    assert hidden.isfinite().all()
    torch.testing.assert_close(hidden[:, content], alone, rtol=1e-9, atol=1e-9)


def test_a_row_of_padding_alone_has_finite_gradients(variant: str) -> None:
    model = build(variant, torch.float32)
    segments = torch.zeros(2, 8, dtype=torch.int32)
    segments[1] = PADDING
    model(batch(tokens(2, 8), any_attention(variant), segments_BS=segments)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- cache


@variants_with(Attention.causal)
@pytest.mark.parametrize("steps", [[11, 1, 1, 1], [1] * 14, [5, 4, 5]])
def test_reading_on_from_a_cache_equals_reading_at_once(variant: str, steps: list[int]) -> None:
    model, one = build(variant, torch.float32, gain=3.0), tokens(2, 14)
    with torch.no_grad():
        cache, parts = model.new_cache(2, 14), one.split(steps, dim=1)
        pieces = []
        for part in parts:
            pieces.append(model(batch(part), cache))
        assert cache.length == sum(steps)
        torch.testing.assert_close(torch.cat(pieces, 1), model(batch(one))[:, : sum(steps)], rtol=1e-5, atol=1e-5)


@variants_with(Attention.causal)
def test_cache_with_left_padding_equals_each_row_alone(variant: str) -> None:
    model, one, lengths = build(variant), tokens(3, 12), [3, 8, 12]
    segments = torch.zeros(3, 12, dtype=torch.int32)
    for row, length in enumerate(lengths):
        segments[row, : 12 - length] = PADDING
    follow = tokens(3, 3, seed=5)
    with torch.no_grad():
        cache = model.new_cache(3, 15)
        pieces = [model(batch(one, segments_BS=segments), cache)]
        pieces += [model(batch(follow[:, i : i + 1]), cache) for i in range(3)]
        hidden = torch.cat(pieces, 1)
        for row, length in enumerate(lengths):
            alone = model(batch(torch.cat((one[row : row + 1, 12 - length :], follow[row : row + 1]), 1)))
            torch.testing.assert_close(hidden[row : row + 1, 12 - length :], alone, rtol=1e-9, atol=1e-9)


@variants_with(Attention.prefix)
def test_prefix_attention_fills_a_cache(variant: str) -> None:
    model, one = build(variant), tokens(1, 12)
    prefix = (torch.arange(12) < 5)[None]
    with torch.no_grad():
        whole = model(batch(one, Attention.prefix, prefix_BS=prefix))
        cache = model.new_cache(1, 12)
        pieces = [model(batch(one[:, :8], Attention.prefix, prefix_BS=prefix[:, :8]), cache)]
        pieces += [model(batch(one[:, i : i + 1]), cache) for i in range(8, 12)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


@variants_with(Attention.prefix)
def test_what_a_cache_cannot_do_is_refused(variant: str) -> None:
    model = build(variant)
    with pytest.raises(ValueError, match="bidirectional"):
        model(batch(tokens(1, 4), Attention.bidirectional), model.new_cache(1, 8))
    with pytest.raises(ValueError, match="the cache holds 3 positions, 4 are needed"):
        model(batch(tokens(1, 4)), model.new_cache(1, 3))
    with pytest.raises(ValueError, match=r"needs Batch\.prefix_BS"):
        model(batch(tokens(1, 4), Attention.prefix))


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


# ---- transformer


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_transformer_equals_llama(kv_heads: int) -> None:
    transformers = pytest.importorskip("transformers")
    described = TransformerConfig(d_model=64, num_layers=3, num_heads=4, num_kv_heads=kv_heads, feed_forward_dim=96)
    ours = described.build(vocab_size=VOCAB).eval()
    theirs = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            max_position_embeddings=64,
        )
    ).eval()
    renamed = {
        "embedding": "embed_tokens", "blocks": "layers", "attention_norm": "input_layernorm", "attention": "self_attn",
        "feed_forward_norm": "post_attention_layernorm", "feed_forward": "mlp", "query": "q_proj", "key": "k_proj", "value": "v_proj",
        "output": "o_proj", "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    theirs_state = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.15 if parameter.ndim == 2 else 1.0))
            theirs_state[".".join(renamed.get(part, part) for part in name.split("."))].copy_(parameter)
        one = tokens(2, 50)
        torch.testing.assert_close(ours(batch(one)), theirs(input_ids=one).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_grouped_queries_equal_repeated_heads() -> None:
    fields = {"d_model": 32, "num_layers": 1, "num_heads": 4}
    grouped = TransformerConfig(**fields, num_kv_heads=2).build(vocab_size=VOCAB).double()
    full = TransformerConfig(**fields).build(vocab_size=VOCAB).double()
    state = grouped.state_dict()
    for kind in ("key", "value"):
        name = f"blocks.0.attention.{kind}.weight"
        state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    one = batch(tokens(2, 20))
    torch.testing.assert_close(grouped(one), full(one), rtol=1e-12, atol=1e-12)


def test_rotary_attention_depends_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        cos, sin = layers.rotary_tables(torch.tensor([query_position, key_position]), 16, 10000.0, q, q.dtype)
        rotated = [layers.rotate(x, (cos[i : i + 1], sin[i : i + 1])) for i, x in enumerate((q, k))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), rel=1e-9)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-3)
    assert score(4, 4) == pytest.approx(float((q * k).sum()), rel=1e-12)


def test_more_positions_than_were_learned_are_refused() -> None:
    model = build("transformer-gpt2")
    with pytest.raises(ConfigError, match=r"41 positions is longer than the 40 learned ones; set backbone.max_positions=41") as error:
        model(batch(tokens(1, 41)))
    assert "\n" not in str(error.value)
    cache = model.new_cache(1, 41)
    model(batch(tokens(1, 40)), cache)
    with pytest.raises(ConfigError, match="41 positions"):
        model(batch(tokens(1, 1)), cache)


def test_dropout_acts_in_training_alone() -> None:
    model = TransformerConfig(d_model=32, num_layers=2, num_heads=4, dropout=0.5).build(vocab_size=VOCAB)
    one = batch(tokens(2, 8))
    assert not torch.equal(model(one), model(one))
    model.eval()
    assert torch.equal(model(one), model(one))


def test_positions_are_counted_inside_segments() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [PADDING, PADDING, 0, 0, 0, 0]])
    assert layers.positions_in_segments(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("form", ["causal", "packed", "bidirectional", "prefix"])
def test_attention_in_blocks_equals_the_fused_kernel(form: str, kv_heads: int) -> None:
    """In fp32, gradients too; 300 positions make three blocks, the last one short."""
    generator, size = torch.Generator().manual_seed(0), 300
    one = tokens(2, size)
    attention = {"bidirectional": Attention.bidirectional, "prefix": Attention.prefix}.get(form, Attention.causal)
    segments = (torch.rand(2, size, generator=generator) < 0.02).cumsum(1) if form == "packed" else None
    prefix = (torch.arange(size) < 170).expand(2, size) if form == "prefix" else None
    like = torch.zeros(())
    reading = layers.prepare_reading(batch(one, attention, segments_BS=segments, prefix_BS=prefix), None, like, None, 1.0)
    assert reading.causal == (attention == Attention.causal)
    shapes = ((2, 4, size, 8), (2, kv_heads, size, 8), (2, kv_heads, size, 8))
    values = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    upstream = torch.randn(2, 4, size, 8, generator=generator)
    results = []
    for function in (layers.attend, layers.attend_in_blocks):
        y = function(*values, reading, 0.3)
        if function is layers.attend:
            y = y.view(2, size, 4, 8).transpose(1, 2)
        results.append((y, *torch.autograd.grad(y, values, upstream)))
    for fused, blocked in zip(*results, strict=True):
        torch.testing.assert_close(blocked, fused, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_bf16_autocast_stays_near_fp32(variant: str, packed: bool) -> None:
    """Within bf16's rounding (2^-8 relative, over three layers), also where attention runs in blocks."""
    model, one = build(variant, torch.float32, gain=2.0), tokens(2, 40)
    segments = (torch.arange(40) // 15).expand(2, 40) if packed else None
    with torch.no_grad():
        exact = model(batch(one, any_attention(variant), segments_BS=segments))
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(batch(one, any_attention(variant), segments_BS=segments))
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.03


# ---- compilation


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["transformer", "ngpt"])
def test_compiled_equals_eager(variant: str) -> None:
    torch._dynamo.reset()
    model = build(variant, torch.float32, gain=2.0)
    compiled, one = torch.compile(model, fullgraph=True), tokens(2, 16)
    segments = (torch.arange(16) // 6).expand(2, 16).int()
    for fields in ({}, {"segments_BS": segments}):
        torch.testing.assert_close(compiled(batch(one, **fields)), model(batch(one, **fields)), rtol=1e-4, atol=1e-5)


def test_traces_without_graph_breaks_and_once_for_any_count_of_targets(variant: str) -> None:
    torch._dynamo.reset()
    model, one = (
        build(variant, torch.float32),
        batch(tokens(2, 16), any_attention(variant), segments_BS=(torch.arange(16) // 6).expand(2, 16).int()),
    )
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for targets in (3, 5, 8):
        compiled(one._replace(num_targets=targets, step_targets=2 * targets))
    assert len(graphs) == 1


# ---- sliding windows


@pytest.mark.parametrize("attention", [Attention.causal, Attention.bidirectional])
@pytest.mark.parametrize("packed", [False, True])
def test_a_window_bounds_how_far_one_layer_sees(attention: Attention, packed: bool) -> None:
    described = TransformerConfig(d_model=32, num_layers=1, num_heads=4, local_attention=LocalAttention(window=5))
    model, one = enlarged(described, VOCAB), tokens(1, 24)
    segments = torch.zeros_like(one) if packed else None
    other = one.clone()
    other[:, 12] = (other[:, 12] + 1) % VOCAB
    change = changed_at(model, batch(one, attention, segments_BS=segments), batch(other, attention, segments_BS=segments))
    seen = range(12, 17) if attention == Attention.causal else range(8, 17)
    assert [i for i in range(24) if change[i] > 1e-6] == list(seen)


def test_a_cache_keeps_the_window() -> None:
    """Read in pieces, past the window, with rows padded on the left."""
    described = TransformerConfig(d_model=32, num_layers=3, num_heads=4, local_attention=LocalAttention(window=4, global_layers=[1]))
    model, one = enlarged(described, VOCAB), tokens(2, 14)
    padded = torch.tensor([[PADDING] * 4 + [0] * 10, [0] * 14]).int()
    for segments in (None, padded):
        whole, cache, pieces = model(batch(one, segments_BS=segments)), model.new_cache(2, 14), []
        for start, end in ((0, 7), (7, 8), (8, 13), (13, 14)):
            given = None if segments is None or start > 6 else segments[:, start:end]
            pieces.append(model(batch(one[:, start:end], segments_BS=given), cache))
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


# ---- nGPT


def ngpt_norms(model: Backbone) -> dict[str, Tensor]:
    writes = (".attention.output.weight", ".feed_forward.down.weight")
    return {n: p.norm(dim=0 if n.endswith(writes) else 1) for n, p in model.named_parameters() if p.ndim == 2}


@pytest.mark.parametrize("variant", ["ngpt", "ngpt-gqa"])
def test_ngpt_matrices_and_hidden_states_have_unit_norm(variant: str) -> None:
    model = config(variant).build(vocab_size=VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    one = batch(tokens(2, 16))
    (model(one) * torch.arange(32)).sum().backward()
    optimizer.step()
    assert any((norm - 1).abs().max() > 0.1 for norm in ngpt_norms(model).values())
    model.after_optimizer_step()
    assert len(ngpt_norms(model)) == 1 + 3 * 7
    for name, norm in ngpt_norms(model).items():
        torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-6, atol=1e-6, msg=name)
    hidden = model(one)
    torch.testing.assert_close(hidden.norm(dim=-1), torch.ones(2, 16), rtol=1e-6, atol=1e-6)


def test_ngpt_block_equals_the_papers_equations() -> None:
    """One head, one layer, uneven scales, written out from the paper; the rotary embedding is shared (tested above)."""
    described = NGPTConfig(d_model=8, num_layers=1, num_heads=1, feed_forward_dim=16, alpha_init=0.4)
    model = described.build(vocab_size=VOCAB).double()
    scales = {n: p for n, p in model.named_parameters() if p.ndim == 1}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in scales.values():
            parameter.mul_(torch.rand(parameter.shape, generator=generator).double() - 0.3)
    w = {n.removeprefix("blocks.0.").removesuffix(".weight"): p for n, p in model.named_parameters()}
    one, root = tokens(1, 6), math.sqrt(8)

    def norm(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    h = w["embedding"][one[0]]
    rotary = layers.rotary_tables(torch.arange(6), 8, 10000.0, h, h.dtype)
    q, k = (layers.rotate((h @ w[f"attention.{kind}"].T)[None, :, None], rotary)[0, :, 0] for kind in ("query", "key"))
    s_qk = w["attention.s_qk"] * root  # init 1, scale 1/sqrt(d_model)
    q, k = norm(q) * s_qk, norm(k) * s_qk
    scores = (q @ k.T * root).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    attention = scores.softmax(-1) @ (h @ w["attention.value"].T) @ w["attention.output"].T
    h = norm(h + (w["alpha_attention"] * 0.4 * root).abs() * (norm(attention) - h))
    u, v = h @ w["feed_forward.up"].T * w["feed_forward.s_u"], h @ w["feed_forward.gate"].T * w["feed_forward.s_v"] * root
    feed_forward = (u * v * v.sigmoid()) @ w["feed_forward.down"].T
    h = norm(h + (w["alpha_feed_forward"] * 0.4 * root).abs() * (norm(feed_forward) - h))
    torch.testing.assert_close(model(batch(one))[0], h, rtol=1e-10, atol=1e-10)


def test_ngpt_scales_start_as_the_paper_says() -> None:
    model = NGPTConfig(d_model=64, num_layers=4, num_heads=4).build(vocab_size=VOCAB)
    block = model.blocks[0]
    for scale, stored, effective in (
        (block.alpha_attention, 1 / 8, 1 / 4),
        (block.alpha_feed_forward, 1 / 8, 1 / 4),
        (block.attention.s_qk, 1 / 8, 1.0),
        (block.feed_forward.s_u, 1.0, 1.0),
        (block.feed_forward.s_v, 1.0, 1.0),
    ):
        assert scale.weight.unique().tolist() == pytest.approx([stored])
        assert scale().unique().tolist() == pytest.approx([effective])


def test_gelu_by_a_sigmoid_is_gelu() -> None:
    """No farther from the exact number than torch's own, up to a rounding; its two derivatives too."""
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([1e-20, -1e4, 1e4])))
    found = []
    for gelu, kind in (
        (partial(F.gelu, approximate="tanh"), torch.float64),
        (partial(F.gelu, approximate="tanh"), x.dtype),
        (gelu_tanh, x.dtype),
    ):
        given = x.to(kind).requires_grad_()
        y = gelu(given)
        (first,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        found.append((y, first, *torch.autograd.grad(first.sum(), given)))
    for exact, theirs, ours in zip(*found, strict=True):
        scale = exact.abs().clamp(min=1)
        assert ((ours - exact).abs() / scale).max() <= ((theirs - exact).abs() / scale).max() + 1e-6


def test_the_first_derivative_of_gelu_is_as_exact_as_torchs() -> None:
    """Without create_graph, where it is ours; and the product of two, in blocks of which the last is smaller."""
    generator, theirs = torch.Generator().manual_seed(0), partial(F.gelu, approximate="tanh")
    a, b = (2 * torch.randn(3, 100_001, generator=generator) for _ in range(2))
    found = []
    for gelu, product, kind in (
        (theirs, lambda x, y: theirs(x) * theirs(y), torch.float64),
        (theirs, lambda x, y: theirs(x) * theirs(y), torch.float32),
        (gelu_tanh, gelu_tanh_product, torch.float32),
    ):
        given = [x.to(kind).requires_grad_() for x in (a, b)]
        both, alone = product(*given), gelu(given[0])
        found.append((both, *torch.autograd.grad(alone.sum(), given[0]), *torch.autograd.grad(both.sum(), given)))
    for exact, torchs, ours in zip(*found, strict=True):
        scale = exact.abs().clamp(min=1)
        assert ((ours - exact).abs() / scale).max() <= ((torchs - exact).abs() / scale).max() + 1e-6
    with torch.no_grad():
        assert torch.equal(gelu_tanh_product(a, b), gelu_tanh(a) * gelu_tanh(b))
    x = a[:, :5].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gelu_tanh_product(x, x).sum(), x, create_graph=True)
