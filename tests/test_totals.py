"""Sums of losses (totals.py): exact however many there are, without the steps that were skipped, alike on every rank."""

from __future__ import annotations

import math

import torch

from heads_lightning.batch import IGNORE, Attention, Batch
from heads_lightning.heads.base import HeadLoss
from heads_lightning.totals import Totals

LABELS = torch.tensor([[5, 5, 5, IGNORE]])
BATCH = Batch(LABELS, LABELS, Attention.causal, num_targets=3, step_targets=3, num_padding=1)


def summed(loss: float) -> HeadLoss:
    """What a head makes of a micro-batch in training."""
    return HeadLoss(torch.tensor(0.0), {"loss": torch.tensor(loss)})


def test_a_small_loss_is_not_lost_in_a_large_sum() -> None:
    totals = Totals()
    for loss in (2.0**24, 1.0, 1.0, 1.0):
        totals.add(summed(loss), BATCH)
        totals.finish_step(torch.tensor(loss))
    assert totals.read() == {"loss": 2.0**24 + 3, "grad_norm": 2.0**24 + 3}


def test_a_skipped_step_is_seen_and_has_no_part_in_the_means() -> None:
    totals = Totals(1)
    for loss, counts in ((4.0, True), (math.inf, False), (6.0, True)):
        for _ in range(2):
            totals.add_parts(HeadLoss(torch.tensor([[loss, loss, loss, 0.0]]), {}), BATCH)
            totals.add(summed(loss), BATCH)
        totals.finish_step(torch.tensor(loss), counts=counts)
    sums = totals.read()
    assert totals.part_means(sums, ["all"]) == {"loss_all": 5.0}
    assert (sums["loss"], sums["grad_norm"]) == (20.0, 10.0)
    assert (totals.targets, totals.targets_seen, totals.good_steps, totals.steps, totals.positions, totals.padding) == (12, 18, 2, 3, 24, 6)
    assert [(float(loss), targets, float(norm)) for loss, targets, norm in totals.by_step] == [
        (8.0, 6, 4.0), (math.inf, 6, math.inf), (12.0, 6, 6.0),
    ]  # fmt: skip


def test_parts_and_statistics_are_alike_on_a_rank_without_a_batch() -> None:
    """A part is the mean over its own targets, each with its weight (losses have theirs already)."""
    batch = BATCH._replace(part_BS=torch.tensor([[0, 1, 1, 1]], dtype=torch.int8), weights_BS=torch.tensor([[1.0, 1.0, 0.5, 9.0]]))
    busy, idle, sent = Totals(2, 3), Totals(2, 3), []
    for _ in range(2):
        busy.add_tokens(HeadLoss(torch.tensor([[1.0, 2.0, 4.0, 0.0]]), {}, torch.tensor([1.0, 2.0, 3.0])), batch)
    idle.over_ranks(lambda values: sent.append(values) or values)
    sums = busy.over_ranks(lambda values: [a + b for a, b in zip(values, sent[0], strict=True)])
    assert sums == (14.0, 6, [2.0, 12.0], [2.0, 3.0], [2.0, 4.0, 6.0])
    assert busy.part_means(busy.read(), ["first", "second"]) == {"loss_first": 1.0, "loss_second": 4.0}
    whole = Totals(2)
    whole.add_tokens(HeadLoss(torch.tensor([[1.0, 2.0, 4.0, 0.0]]), {}), BATCH)  # no parts: all is the first
    assert whole.part_means(whole.read(), ["first", "second"]) == {"loss_first": 7 / 3}
