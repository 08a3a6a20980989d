"""Every registered backbone: who sees whom, packing, padding, and caches."""

from __future__ import annotations

import pytest
import torch
from backbone_variants import VARIANTS, VOCAB, any_attention, build, config

from heads_lightning.batch import PADDING, Attention
from heads_lightning.configs.backbone import backbones
from heads_lightning.testing.backbones import LEAK, changed_at
from heads_lightning.testing.backbones import batch_of as batch
from heads_lightning.testing.backbones import draw_tokens as tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def variants_with(attention: Attention) -> pytest.MarkDecorator:
    """The variants that give an attention kind."""
    return pytest.mark.parametrize("variant", [v for v in VARIANTS if attention in config(v).attention_supported()])


EACH = [(v, a) for v in VARIANTS for a in sorted(config(v).attention_supported())]
"""Every variant with every attention kind that it gives."""


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
