"""BiGS: reading on from a state equals reading at once (B13)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bigs_reference import CAUSAL, FORMS, VOCAB

from heads_lightning.batch import PADDING
from heads_lightning.configs.layers import Position
from heads_lightning.registry import ConfigError
from heads_lightning.testing.backbones import batch_of, draw_tokens, enlarged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("steps", [[20, *[1] * 20], [1] * 40, [15, 10, 15]], ids=["prefill", "steps", "pieces"])
def test_recurrent_decoding_equals_the_parallel_form(name: str, steps: list[int]) -> None:
    model, tokens = enlarged(FORMS[name], dtype=torch.float32, gain=4.0), draw_tokens(2, 40)
    with torch.no_grad():
        whole, cache = model(batch_of(tokens)), model.new_cache(2, 40)
        pieces = [model(batch_of(part), cache) for part in tokens.split(steps, dim=1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_the_state_does_not_grow() -> None:
    model = replace(CAUSAL, position=Position.none).build(vocab_size=VOCAB)
    cache = model.new_cache(1, 0)

    def held() -> int:
        return sum(state.values_BXD.numel() for block in cache.states for state in block)

    before = held()
    with torch.no_grad():
        model(batch_of(draw_tokens(1, 500)), cache)
    assert (held(), cache.length) == (before, 500)


@pytest.mark.parametrize("sizes", [[1] * 20, [5, 6, 9]], ids=["positions", "pieces"])
def test_documents_read_bit_by_bit_stay_apart(sizes: list[int]) -> None:
    """Borders lie inside pieces, in another place in each row."""
    model, tokens = enlarged(CAUSAL), draw_tokens(2, 20)
    segments = (torch.arange(20) >= torch.tensor([[8], [13]])).long()
    with torch.no_grad():
        cache = model.new_cache(2, 20)
        steps = zip(tokens.split(sizes, dim=1), segments.split(sizes, dim=1), strict=True)
        got = [model(batch_of(token, segments_BS=segment), cache) for token, segment in steps]
        torch.testing.assert_close(torch.cat(got, 1), model(batch_of(tokens, segments_BS=segments)), rtol=1e-9, atol=1e-9)


def test_a_prompt_of_two_documents_leaves_the_state_of_the_last() -> None:
    model, tokens = enlarged(CAUSAL), draw_tokens(1, 20)
    segments = (torch.arange(20) >= 8).long()[None]
    with torch.no_grad():
        cache, alone = model.new_cache(1, 30), model.new_cache(1, 30)
        model(batch_of(tokens[:, :12], segments_BS=segments[:, :12]), cache)
        model(batch_of(tokens[:, 8:12]), alone)
        got = model(batch_of(tokens[:, 12:], segments_BS=segments[:, 12:]), cache)
        torch.testing.assert_close(got, model(batch_of(tokens[:, 12:]), alone), rtol=1e-9, atol=1e-9)


def test_documents_begin_in_the_middle_of_what_is_read_on() -> None:
    """The first piece comes without segments; and a number that comes again, after another document, is a new document."""
    model, tokens = enlarged(CAUSAL), draw_tokens(1, 18)
    segments = torch.tensor([[0] * 8 + [1] * 4 + [0] * 3 + [1] * 3])
    with torch.no_grad():
        cache = model.new_cache(1, 18)
        pieces = [model(batch_of(tokens[:, :5]), cache)]
        pieces += [model(batch_of(tokens[:, a:b], segments_BS=segments[:, a:b]), cache) for a, b in ((5, 12), (12, 18))]
        apart = [model(batch_of(tokens[:, a:b])) for a, b in ((0, 8), (8, 12), (12, 15), (15, 18))]
    torch.testing.assert_close(torch.cat(pieces, 1), torch.cat(apart, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_rows_chosen_anew_go_on_with_what_those_rows_have_read(name: str) -> None:
    """Beam search. Documents end at another place in each row: state, segment and position go with the row."""
    model, tokens, rows = enlarged(FORMS[name]), draw_tokens(3, 20), torch.tensor([2, 0, 0])
    segments = (torch.arange(20) >= torch.tensor([[8], [11], [15]])).long()
    whole = torch.cat((tokens[rows, :12], tokens[:, 12:]), 1), torch.cat((segments[rows, :12], segments[rows, 12:]), 1)
    with torch.no_grad():
        cache = model.new_cache(3, 20)
        model(batch_of(tokens[:, :12], segments_BS=segments[:, :12]), cache)
        cache.reorder(rows)
        got = [model(batch_of(whole[0][:, at : at + 4], segments_BS=whole[1][:, at : at + 4]), cache) for at in (12, 16)]
        want = model(batch_of(whole[0], segments_BS=whole[1]))[:, 12:]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4]], ids=["positions", "pieces"])
def test_rows_padded_on_the_left_read_on_as_they_would_alone(name: str, sizes: list[int]) -> None:
    """The prompt is padded, what follows comes without segments; a position counts from the first token of its row."""
    model, tokens, pads = enlarged(FORMS[name]), draw_tokens(2, 16), (0, 5)
    segments = torch.where(torch.arange(10) < torch.tensor(pads)[:, None], PADDING, 0)
    with torch.no_grad():
        cache = model.new_cache(2, 16)
        pieces = [model(batch_of(tokens[:, :10], segments_BS=segments), cache)]
        pieces += [model(batch_of(part), cache) for part in tokens[:, 10:].split(sizes, dim=1)]
        got = torch.cat(pieces, 1)
        for row, pad in enumerate(pads):
            torch.testing.assert_close(got[row, pad:], model(batch_of(tokens[row : row + 1, pad:]))[0], rtol=1e-9, atol=1e-9)


def test_reading_on_past_the_learned_positions_is_refused() -> None:
    model = CAUSAL.build(vocab_size=VOCAB)
    cache = model.new_cache(1, 65)
    with torch.no_grad():
        model(batch_of(draw_tokens(1, 60)), cache)
        model(batch_of(draw_tokens(1, 4)), cache)
        with pytest.raises(ConfigError, match="65 positions is longer than the 64 learned ones"):
            model(batch_of(draw_tokens(1, 1)), cache)
