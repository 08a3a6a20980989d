"""The contract of an encoder-decoder backbone: who sees whom across the two sequences, packing, padding, and the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from heads_lightning.batch import PADDING, Attention, Batch
from heads_lightning.testing.base import assert_near

LEAK, SEEN = 1e-10, 1e-6
"""As in testing/backbones.py."""
KIND = Attention.encoder_decoder


def check_encoder_decoder(model: Any) -> None:
    """backbones.base.Backbone with attention=encoder_decoder, for an enlarged model in fp64."""
    _check_sight(model)
    _check_packing_and_padding(model)
    _check_cache(model)


def _draw(rows: int, size: int, seed: int) -> Tensor:
    return torch.randint(0, 61, (rows, size), generator=torch.Generator().manual_seed(seed))


def _batch(decoder_BS: Tensor, encoder_BT: Tensor | None, **given: Any) -> Batch:
    return Batch(decoder_BS, decoder_BS, KIND, 0, 0, encoder_tokens_BT=encoder_BT, **given)


def _changed_at(model: nn.Module, one: Batch, other: Batch) -> Tensor:
    """[S]: largest change of the hidden state of each decoder position."""
    with torch.no_grad():
        return (model(one) - model(other)).abs().amax(dim=(0, 2))


def _check_sight(model: nn.Module) -> None:
    decoder, encoder = _draw(2, 14, 1), _draw(2, 24, 2)
    for at in (0, 6, 13):
        other = decoder.clone()
        other[:, at] = (other[:, at] + 1) % 61
        change = _changed_at(model, _batch(decoder, encoder), _batch(other, encoder))
        leaked = (change[:at] > LEAK).nonzero().flatten().tolist()
        assert not leaked, f"attention={KIND}: decoder positions {leaked} see decoder position {at}, which comes after them"
        for place, what in ((change[at], "itself"), (change[at + 1 :].max() if at < 13 else change[at], "from after it")):
            assert place > SEEN, f"attention={KIND}: decoder position {at} is not seen {what}, as it should be"
    for at in (0, 12, 23):
        other = encoder.clone()
        other[:, at] = (other[:, at] + 1) % 61
        change = _changed_at(model, _batch(decoder, encoder), _batch(decoder, other))
        assert change.max() > SEEN, f"attention={KIND}: no decoder position sees encoder position {at}, which all should"


def _runs(places: list[int], lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(places), torch.tensor(lengths)).expand(2, sum(lengths)).int()


def _check_packing_and_padding(model: nn.Module) -> None:
    decoder, encoder = _draw(2, 14, 1), _draw(2, 24, 2)
    for places, name in (([0, 1, 2], "packed"), ([PADDING, 0, 1], "padded on the left"), ([0, 1, PADDING], "padded on the right")):
        own, lengths = [4, 7, 3], [7, 12, 5]
        whole = _batch(decoder, encoder, segments_BS=_runs(places, own), encoder_segments_BT=_runs(places, lengths))
        with torch.no_grad():
            hidden = model(whole)
        assert hidden.isfinite().all(), f"{KIND}, {name}: hidden states are not finite"
        for part, place in enumerate(places):
            mine = slice(sum(own[:part]), sum(own[: part + 1]))
            theirs = slice(sum(lengths[:part]), sum(lengths[: part + 1]))
            for field, where, tokens in (("tokens_BS", mine, decoder), ("encoder_tokens_BT", theirs, encoder)):
                other = tokens.clone()
                other[:, where] = _draw(2, where.stop - where.start, 9)
                change = _changed_at(model, whole, whole._replace(**{field: other}))
                outside = torch.cat((change[: mine.start], change[mine.stop :]))
                assert not (outside > LEAK).any(), f"{KIND}, {name}: segments see each other's {field}"
                assert place == PADDING or change[mine].max() > SEEN, f"{KIND}, {name}: other {field} change nothing"
            if place != PADDING:
                with torch.no_grad():
                    alone = model(_batch(decoder[:, mine], encoder[:, theirs]))
                assert_near(hidden[:, mine], alone, 1e-9, f"{KIND}, {name}: a segment against itself alone (its positions count from 0)")
    blind = _batch(decoder, encoder, encoder_segments_BT=torch.full_like(encoder, PADDING))
    with torch.no_grad():
        assert model(blind).isfinite().all(), f"{KIND}: an encoder row of padding alone gives what is not finite"
    change = _changed_at(model, blind, blind._replace(encoder_tokens_BT=_draw(2, 24, 9)))
    assert not (change > LEAK).any(), f"{KIND}: a decoder that may see nothing of the encoder sees its padding"


def _check_cache(model: Any) -> None:
    decoder, encoder = _draw(2, 9, 1), _draw(2, 12, 2)
    padded, sources = _runs([PADDING, 0], [3, 6]).clone(), _runs([0, PADDING], [8, 4]).clone()
    padded[1], sources[1] = 0, 0
    for segments, encoder_segments in ((None, None), (padded, sources), (padded, None)):
        with torch.no_grad():
            whole = model(_batch(decoder, encoder, segments_BS=segments, encoder_segments_BT=encoder_segments))
            for steps in ([6, 1, 1, 1], [4, 3, 2]):
                cache, done, pieces = model.new_cache(2, 9), 0, []
                for size in steps:
                    first, part, done = done == 0, slice(done, done + size), done + size
                    given = {"segments_BS": None if segments is None or not first else segments[:, part]}
                    given |= {"encoder_segments_BT": encoder_segments if first else None}
                    pieces.append(model(_batch(decoder[:, part], encoder if first else None, **given), cache))
                    assert cache.length == done, f"a cache that has read {done} positions says {cache.length}"
                kind = "a cache" if segments is None else "a cache, padded"
                assert_near(torch.cat(pieces, 1), whole, 1e-9, f"{kind}: reading {steps} positions against reading them at once")
