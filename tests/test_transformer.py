"""The transformer and nGPT: against Llama, the papers' equations, positions, windows and kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backbone_variants import VARIANTS, VOCAB, any_attention, build, config
from torch import Tensor

from heads_lightning.backbones import layers
from heads_lightning.backbones.base import Backbone
from heads_lightning.batch import PADDING, Attention
from heads_lightning.configs.layers import (
    LocalAttention,
)
from heads_lightning.configs.transformer import NGPTConfig, TransformerConfig
from heads_lightning.registry import ConfigError
from heads_lightning.testing.backbones import batch_of as batch
from heads_lightning.testing.backbones import changed_at, enlarged
from heads_lightning.testing.backbones import draw_tokens as tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


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
