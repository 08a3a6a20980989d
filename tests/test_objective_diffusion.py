"""Masked diffusion: times, weights and the bound; several tokens ahead: labels, documents and the head that predicts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objective_data import stream, vocabulary, windows

from heads_lightning.batch import IGNORE, Batch
from heads_lightning.configs.head import DefaultLMHeadConfig
from heads_lightning.configs.objective import MaskedDiffusionConfig, MultiTokenConfig
from heads_lightning.objectives.base import SampleRandom
from heads_lightning.registry import ConfigError

MASK = 2


def diffuse(count, *, trained=None, length=64, tokens=None):
    objective = MaskedDiffusionConfig().build(vocabulary())
    raw = windows(objective, length, range(count)) if tokens is None else tokens
    return raw.astype(np.int64), objective.examples(raw, SampleRandom(0, 0, np.arange(count), trained), length)


class TestMaskedDiffusion:
    def test_hidden_tokens_are_the_targets_and_special_ones_are_never_hidden(self):
        raw, examples = diffuse(200)
        hidden = examples.labels_BS != IGNORE
        assert np.array_equal(examples.tokens_BS == MASK, hidden)
        assert np.array_equal(examples.labels_BS[hidden], raw[hidden])
        assert not (hidden & vocabulary().special_V[raw]).any()
        assert np.array_equal(examples.counts_B, (~vocabulary().special_V[raw]).sum(axis=1))

    @pytest.mark.parametrize("start", [0, 12345])
    def test_times_of_any_run_of_samples_are_spread_evenly(self, start):
        """Low-variance sampling without a batch: 16 consecutive samples of training leave no gap beyond 1.7 / 16."""
        tokens = np.full((16, 64), 900, np.uint16)
        _, examples = diffuse(16, trained=64 * (start + np.arange(16)), tokens=tokens)
        times = np.sort(1 / examples.weights_BS[:, 0])
        gaps = np.diff(np.concatenate([times, [times[0] + 1]]))
        assert gaps.max() < 1.7 / 16
        shares = (examples.labels_BS != IGNORE).mean(axis=1)
        assert np.abs(shares - 1 / examples.weights_BS[:, 0]).max() < 5 * np.sqrt(0.25 / 64)

    def test_the_weighted_sum_counts_every_token_once_on_average(self):
        """E[Σ 1/t over the hidden] = tokens: with a model that knows nothing, the loss is log V, not half of it or twice."""
        tokens = np.full((20_000, 64), 900, np.uint16)
        _, examples = diffuse(20_000, tokens=tokens)
        total = examples.weights_BS[examples.labels_BS != IGNORE].sum(dtype=np.float64)
        assert abs(total / examples.counts_B.sum() - 1) < 0.01

    def test_a_batch_divides_by_the_tokens_counted(self):
        _, examples = diffuse(8)
        batch = Batch.from_examples(examples, MaskedDiffusionConfig.attention)
        assert batch.counted == batch.step_targets == examples.counts_B.sum()
        assert batch.num_targets == (examples.labels_BS != IGNORE).sum()


class TestMultiToken:
    def make(self, steps, count=60, length=64):
        objective = MultiTokenConfig(steps_ahead=steps, weight=0.25).build(vocabulary())
        return objective, objective.examples(windows(objective, length, range(count)), SampleRandom(0, 0, np.arange(count)), length)

    def test_labels_of_each_step(self):
        objective, examples = self.make(3)
        assert objective.parts == ("next", "ahead_2", "ahead_3", "ahead_4")
        source, segments = stream().astype(np.int64), examples.segments_BS
        crossed = 0
        for b in range(60):
            for step in range(4):
                block = examples.labels_BS[b, step * 64 : (step + 1) * 64]
                for s in range(64 - step):
                    same = segments[b, s + step] == segments[b, s]
                    crossed += not same
                    assert block[s] == (source[b * 64 + s + step + 1] if same else IGNORE)
                assert (examples.part_BS[b, step * 64 : (step + 1) * 64] == step).all()
                assert (examples.weights_BS[b, step * 64 : (step + 1) * 64] == (0.25 if step else 1)).all()
        assert crossed > 0

    def test_the_head_predicts_every_step(self):
        """A head whose steps are all the next one (as it begins) gives the sum of the blocks' losses; alone, the next token's."""
        _, examples = self.make(2, count=2)
        head = DefaultLMHeadConfig(steps_ahead=2).build(d_model=16, vocab_size=vocabulary().size)
        hidden = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
        labels, weights = torch.from_numpy(examples.labels_BS), torch.from_numpy(examples.weights_BS)
        blocks = [head(hidden, labels=labels[:, k : k + 64].contiguous(), loss_reduction="sum").loss for k in (0, 64, 128)]
        whole = head(hidden, labels=labels, weights=weights, loss_reduction="sum").loss
        torch.testing.assert_close(whole, blocks[0] + 0.25 * (blocks[1] + blocks[2]))
        torch.nn.init.normal_(head.ahead[0].weight)
        changed = head(hidden, labels=labels, weights=weights, loss_reduction="none").ce_loss
        assert torch.equal(changed[:, :64], head(hidden, labels=labels[:, :64].contiguous(), loss_reduction="none").ce_loss)
        assert not torch.equal(changed[:, 64:128], changed[:, :64])
        whole = head(hidden, labels=labels, weights=weights, loss_reduction="sum").loss
        whole.backward()
        assert all(block.weight.grad.abs().sum() > 0 for block in head.ahead)

    def test_the_sizes_agree_with_the_config(self):
        config = DefaultLMHeadConfig(steps_ahead=2)
        head = config.build(d_model=16, vocab_size=50)
        assert sum(p.numel() for p in head.parameters()) == config.num_params(16, 50)

    def test_refusals(self):
        with pytest.raises(ConfigError, match="none is objective=causal"):
            MultiTokenConfig(steps_ahead=0)
        with pytest.raises(ConfigError, match="more than 0"):
            MultiTokenConfig(weight=0)
