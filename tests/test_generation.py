"""Generation and scoring: batches equal single prompts, stops and filters hold, sums equal a slow reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads_lightning.backbones.base import Backbone
from heads_lightning.batch import IGNORE, Attention, Batch
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.layers import Direction, Position
from heads_lightning.configs.transformer import NGPTConfig, TransformerConfig
from heads_lightning.generation import generate, infill, score

VOCAB = 37


pytestmark = pytest.mark.usefixtures("one_thread")


class TinyHead(nn.Module):
    """Stands for a head: the same call, nothing more."""

    def __init__(self, d_model: int, gain: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight_VD = nn.Parameter(torch.randn(VOCAB, d_model, generator=generator) * gain)

    def forward(self, hidden_BSD: Tensor, *, labels: Tensor | None = None, loss_reduction: str = "mean", logits_to_keep: int = 0) -> Any:
        logits = hidden_BSD[:, -logits_to_keep:] @ self.weight_VD.T
        if labels is None:
            return logits
        assert loss_reduction == "none"
        return SimpleNamespace(ce_loss=F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"))


MODELS = {
    "rotary": TransformerConfig(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2),
    "learned": TransformerConfig(d_model=32, num_layers=2, num_heads=4, position=Position.learned, max_positions=64, dropout=0.3),
    "ngpt": NGPTConfig(d_model=32, num_layers=2, num_heads=4),
    "bigs": BiGSBackboneConfig(d_model=32, num_layers=2, direction=Direction.causal, dropout=0.3),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[Backbone, TinyHead]:
    backbone = MODELS[request.param].build(vocab_size=VOCAB)
    backbone.reset_parameters(torch.Generator().manual_seed(1))
    with torch.no_grad():  # uneven answers: at the initial scale every prompt gets the same token
        for parameter in backbone.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    backbone.after_optimizer_step()
    return backbone, TinyHead(32, 4.0 if request.param == "ngpt" else 1.0)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def slow_greedy(backbone: Backbone, head: TinyHead, prompt: list[int], count: int) -> list[int]:
    """Without a cache, one full forward pass for each new token."""
    backbone.eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.tensor([ids])
            ids.append(int(head(backbone(Batch(tokens, tokens, Attention.causal, 0, 0)))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_full_forward_passes_for_unequal_prompts(model: tuple[Backbone, TinyHead]) -> None:
    backbone, head = model
    asked = prompts(3, 11, 1, 7)
    answers = generate(backbone, head, asked, max_new_tokens=12)
    assert answers == [slow_greedy(backbone, head, p, 12) for p in asked]
    assert len({tuple(a) for a in answers}) == 4


def test_draws_of_a_batch_equal_those_alone(model: tuple[Backbone, TinyHead]) -> None:
    backbone, head = model
    asked = prompts(5, 2, 9)
    sampling: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0.8, "top_k": 9, "top_p": 0.95}
    both = generate(backbone, head, asked, generator=torch.Generator().manual_seed(7), **sampling)
    assert both == generate(backbone, head, asked, generator=torch.Generator().manual_seed(7), **sampling)
    assert both != generate(backbone, head, asked, generator=torch.Generator().manual_seed(8), **sampling)
    assert both[0] == generate(backbone, head, asked[:1], generator=torch.Generator().manual_seed(7), **sampling)[0]
    assert both[:2] == generate(backbone, head, asked[:2], generator=torch.Generator().manual_seed(7), **sampling)


def test_stop_ids_end_their_row_alone(model: tuple[Backbone, TinyHead]) -> None:
    backbone, head = model
    asked = prompts(3, 11, 7)
    free = generate(backbone, head, asked, max_new_tokens=12)
    stop = free[1][4]
    stopped = generate(backbone, head, asked, max_new_tokens=12, stop_ids=[stop])
    assert stopped == [a[: a.index(stop)] if stop in a else a for a in free]
    assert len(stopped[1]) < 12
    assert infill(backbone, head, asked, fim_end=stop, max_new_tokens=12, forbidden_ids=[stop]) == stopped


def test_forbidden_ids_never_appear(model: tuple[Backbone, TinyHead]) -> None:
    backbone, head = model
    forbidden = list(range(1, VOCAB, 2))
    for temperature in (0.0, 5.0):
        answers = generate(backbone, head, prompts(4, 6), max_new_tokens=15, temperature=temperature, forbidden_ids=forbidden)
        assert not {i for a in answers for i in a} & set(forbidden)


def test_top_k_of_one_and_a_tiny_nucleus_are_greedy(model: tuple[Backbone, TinyHead]) -> None:
    backbone, head = model
    greedy = generate(backbone, head, prompts(4, 6), max_new_tokens=8)
    assert generate(backbone, head, prompts(4, 6), max_new_tokens=8, temperature=2.0, top_k=1) == greedy
    assert generate(backbone, head, prompts(4, 6), max_new_tokens=8, temperature=2.0, top_p=1e-6) == greedy


class FixedHead(nn.Module):
    """The same distribution at every position."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits_V = torch.tensor(probabilities).log()

    def forward(self, hidden_BSD: Tensor, *, logits_to_keep: int = 0) -> Tensor:
        return self.logits_V.expand(hidden_BSD.shape[0], 1, -1).clone()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0.1, 0.5, 0.25, 0.15]),
        ({"top_k": 2}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_p": 0.7}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_p": 0.8}, [0, 5 / 9, 2.5 / 9, 1.5 / 9]),
        ({"top_k": 3, "top_p": 0.7}, [0, 2 / 3, 1 / 3, 0]),
        ({"forbidden_ids": [1]}, [0.2, 0, 0.5, 0.3]),
    ],
)
def test_draws_follow_the_filtered_distribution(filters: dict[str, Any], expected: list[float]) -> None:
    backbone = MODELS["rotary"].build(vocab_size=VOCAB)
    head = FixedHead([0.1, 0.5, 0.25, 0.15])
    answers = generate(backbone, head, [[1]] * 200, max_new_tokens=30, temperature=1.0, **filters)
    drawn = torch.tensor(answers).flatten().bincount(minlength=4) / 6000
    torch.testing.assert_close(drawn, torch.tensor(expected), atol=0.03, rtol=0)  # 4.6 standard deviations of 6000 draws
    assert ((drawn == 0) == (torch.tensor(expected) == 0)).all()


def test_the_training_mode_of_every_part_comes_back(model: tuple[Backbone, TinyHead]) -> None:
    backbone, head = model
    backbone.train()
    backbone.get_submodule("blocks.0").eval()
    first = generate(backbone, head, prompts(4), max_new_tokens=6)
    assert first == generate(backbone, head, prompts(4), max_new_tokens=6)  # no dropout
    assert backbone.training
    assert not backbone.get_submodule("blocks.0").training
    assert torch.is_grad_enabled()


def test_nothing_to_do_and_nothing_to_read() -> None:
    backbone = MODELS["rotary"].build(vocab_size=VOCAB)
    head = TinyHead(32, 1.0)
    assert generate(backbone, head, [], max_new_tokens=3) == []
    assert generate(backbone, head, [[1], [2]], max_new_tokens=0) == [[], []]
    with pytest.raises(ValueError, match="empty prompt"):
        generate(backbone, head, [[1], []], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"top_p=0\.0"):
        generate(backbone, head, [[1]], max_new_tokens=3, top_p=0.0)


def test_prefix_models_read_the_prompt_bidirectionally() -> None:
    backbone = MODELS["rotary"].build(vocab_size=VOCAB).eval()
    head, asked = TinyHead(32, 1.0), prompts(9)[0]
    tokens = torch.tensor([asked])
    with torch.no_grad():
        hidden = backbone(Batch(tokens, tokens, Attention.prefix, 0, 0, prefix_BS=torch.ones_like(tokens, dtype=torch.bool)))
    [[first, *_]] = generate(backbone, head, [asked], max_new_tokens=3, attention=Attention.prefix)
    assert first == int(head(hidden)[0, -1].argmax())


@pytest.mark.parametrize("positions_per_batch", [1, 30, 8192])
def test_score_equals_a_sum_of_log_probabilities(model: tuple[Backbone, TinyHead], positions_per_batch: int) -> None:
    backbone, head = model
    sequences = [*prompts(9, 4, 17, 1), []]
    generator = torch.Generator().manual_seed(3)
    targets = [[False, *(torch.rand(len(s) - 1, generator=generator) < 0.6).tolist()] if s else [] for s in sequences]
    totals = score(backbone, head, sequences, targets, positions_per_batch=positions_per_batch)
    backbone.eval()
    for ids, marks, total in zip(sequences, targets, totals, strict=True):
        expected = 0.0
        for place in [p for p, mark in enumerate(marks) if mark]:
            before = torch.tensor([ids[:place]])
            with torch.no_grad():
                logits = head(backbone(Batch(before, before, Attention.causal, 0, 0)))[0, -1]
            expected -= float(logits.double().log_softmax(-1)[ids[place]])
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_targets_that_cannot_be_scored_are_refused() -> None:
    backbone = MODELS["rotary"].build(vocab_size=VOCAB)
    for marks in ([True, False], [False]):
        with pytest.raises(ValueError, match="first id of a sequence cannot be a target"):
            score(backbone, TinyHead(32, 1.0), [[1, 2]], [marks])
