"""The traps that a type system, or a test of a second, can rule out: every one, and where it is shown (`TRAPS`). Those without another
home are here."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bigram import Bigram
from objective_data import stream, vocabulary, windows

from heads_lightning.batch import IGNORE, PADDING, Batch
from heads_lightning.composition import compose
from heads_lightning.configs.batch_sizes import BatchSizes
from heads_lightning.configs.head import DefaultLMHeadConfig
from heads_lightning.configs.objective import (
    CausalConfig,
    FIMConfig,
    FIMLoss,
    MaskedDiffusionConfig,
    MLMConfig,
    MLMCount,
    MLMUnit,
    MultiTokenConfig,
    PrefixLMConfig,
    SpanCorruptionConfig,
    objectives,
)
from heads_lightning.configs.tokenizer import BPEConfig, ByteConfig
from heads_lightning.configs.transformer import NGPTConfig, TransformerConfig
from heads_lightning.data.datamodule import StepBatches
from heads_lightning.data.shards import Shard
from heads_lightning.data.stream import SampleStream
from heads_lightning.objectives.base import SampleRandom
from heads_lightning.registry import ConfigError

TRAPS = {
    "a bidirectional model with next-token targets": [
        "test_configs.test_every_pair_of_objective_backbone_and_head_composes_or_is_refused_in_a_sentence",
        "test_traps.test_the_attention_of_objective_and_backbone_agree",
        "test_traps.test_changing_the_next_token_moves_no_logit_before_it",
        "test_backbones.test_causal_never_sees_the_future",
    ],
    "a causal model with masked targets": [
        "test_configs.test_every_pair_of_objective_backbone_and_head_composes_or_is_refused_in_a_sentence",
        "test_traps.test_the_attention_of_objective_and_backbone_agree",
        "test_backbones.test_bidirectional_sees_the_future",
    ],
    "packed documents attend to each other": [
        "test_traps.test_another_first_document_leaves_the_logits_of_the_second_bit_equal",
        "test_backbones.test_packed_documents_are_isolated_and_equal_to_themselves_alone",
        "test_t5_model.test_packed_sequences_are_computed_as_if_alone",
    ],
    "labels shifted twice, or never": [
        "test_traps.test_a_copy_task_reaches_zero_and_a_shifted_one_does_not",
        "test_traps.test_masked_targets_stand_where_they_are_hidden",
    ],
    "a mean over unequal counts of labels": [
        "test_traps.test_gradients_are_equal_however_a_step_is_cut",
        "test_training.test_loss_and_weights_do_not_depend_on_how_the_batch_is_cut",
        "test_training.test_two_processes_give_the_weights_of_one",
        "test_parallel.test_sharded_ranks_give_the_weights_of_one_process",
    ],
    "the last partial window of accumulation": [
        "test_traps.test_gradients_are_equal_however_a_step_is_cut",
        "test_training.test_loss_and_weights_do_not_depend_on_how_the_batch_is_cut",
    ],
    "the end of a document used as padding and masked out": ["test_traps.test_document_ends_are_learnt_even_where_padding_has_their_id"],
    "special ids past the vocabulary, padded rows predicted": [
        "test_traps.test_every_special_id_is_inside_the_vocabulary",
        "test_traps.test_padded_rows_of_a_tied_embedding_have_no_logits",
    ],
    "tied weights with a normalized head; z-loss and soft cap with fused losses": [
        "test_traps.test_a_tied_normalized_head_is_refused_in_a_sentence",
        "test_heads.test_matrix_of_heads_losses_and_features",
        "test_heads_building.test_ties_that_cannot_be_are_refused",
        "test_losses.test_declared_features_are_computed_without_falling_back",
    ],
}
"""Where each trap is shown to be none."""


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_its_tests(trap):
    """A test that is renamed or dropped is missed here."""
    for reference in TRAPS[trap]:
        file, _, name = reference.partition(".")
        tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, reference


def make(config, length=64, count=40, seed=0):
    objective = config.build(vocabulary())
    return objective, objective.examples(windows(objective, length, range(count)), SampleRandom(seed, 0, np.arange(count)), length)


# -- a bidirectional trunk with next-token targets, a causal one with masks ---------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [(["objective=causal", "backbone.dropout=0"], "causal"), (["objective=mlm", "head=mlm", "backbone=ngpt"], "bidirectional")],
)
def test_the_attention_of_objective_and_backbone_agree(overrides, needs):
    """The trunk gets its attention from the objective; one that cannot give it is refused."""
    try:
        config = compose(overrides)
    except ConfigError as error:
        assert f"needs {needs} attention" in str(error)  # noqa: PT017 (either outcome is right, a silent mismatch is not)
    else:
        assert config.objective.attention == needs
        assert needs in config.backbone.attention_supported()


@pytest.mark.parametrize("name", [n for n, cls in objectives.items() if cls.attention == "causal"])
def test_changing_the_next_token_moves_no_logit_before_it(name):
    objective, examples = make(objectives[name](), count=2)
    backbone = TransformerConfig(d_model=32, num_layers=2, num_heads=2).build(vocab_size=vocabulary().size)
    backbone.reset_parameters(torch.Generator().manual_seed(0))
    batch = Batch.from_examples(examples, objective.attention)
    changed = batch.tokens_BS.clone()
    changed[:, 33] = (changed[:, 33] + 1) % 900 + 200
    with torch.no_grad():
        before, after = backbone(batch), backbone(batch._replace(tokens_BS=changed))
    assert torch.equal(before[:, :33], after[:, :33])
    assert not torch.equal(before[:, 33:], after[:, 33:])


# -- packed documents attend to each other ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CausalConfig(), FIMConfig(rate=1.0), MLMConfig(), PrefixLMConfig(), MaskedDiffusionConfig()], ids=str)
@pytest.mark.parametrize("backbone_config", [TransformerConfig, NGPTConfig])
def test_another_first_document_leaves_the_logits_of_the_second_bit_equal(config, backbone_config):
    v = vocabulary()
    first, second = v.encode("import os, sys\n"), v.encode("def f(x):\n    return x + 1\n" * 2)
    ids = np.array([v.end_of_document, *first, v.end_of_document, *second, v.end_of_document])
    other = ids.copy()
    other[1 : 1 + len(first)] = v.encode("z")[0]
    objective = config.build(v)
    width = objective.window(len(ids) + 20).length
    rows = np.stack([np.resize(x, width) for x in (ids, other)])
    examples = objective.examples(rows, SampleRandom(0, 0, np.zeros(2, int)), len(ids) + 20)
    backbone = backbone_config(d_model=32, num_layers=2, num_heads=2).build(vocab_size=v.size)
    if objective.attention not in backbone_config(d_model=32, num_layers=2, num_heads=2).attention_supported():
        pytest.skip("this backbone does not give that attention")
    backbone.reset_parameters(torch.Generator().manual_seed(0))
    segments, tokens = examples.segments_BS, examples.tokens_BS
    both = segments[0] == 1
    # the same second document at the same place; where the first one's cut moved it, judge the model alone: give row 1 the second of row 0
    tokens[1, both] = tokens[0, both]
    segments[1] = segments[0]
    batch = Batch.from_examples(examples, objective.attention)
    with torch.no_grad():
        hidden = backbone(batch)
    assert not np.array_equal(tokens[0, segments[0] == 0], tokens[1, segments[0] == 0])
    assert torch.equal(hidden[0, both], hidden[1, both])


# -- labels shifted twice, or never --------------------------------------------------------------------------------------


CYCLE = np.arange(200, 230)
"""Tokens of a text in which each token tells the next."""


def perfect(jump: int) -> torch.Tensor:
    """Logits [V, V] of a model that knows the token `jump` places on in the cycle."""
    table = torch.full((vocabulary().size, vocabulary().size), -50.0)
    for i, token in enumerate(CYCLE):
        table[token, CYCLE[(i + jump) % 30]] = 50.0
    return table


def loss_of(table: torch.Tensor, examples, attention, block: int = 0) -> float:
    size = vocabulary().size
    head = DefaultLMHeadConfig(bias=False).build(d_model=size, vocab_size=size)
    length = examples.tokens_BS.shape[1]
    with torch.no_grad():
        head.w_out.weight.copy_(table.T)
        batch = Batch.from_examples(examples, attention)
        labels = batch.labels_BS[:, block * length : (block + 1) * length].contiguous()
        return float(head(Bigram(size)(batch), labels=labels).loss)


@pytest.mark.parametrize(
    "config", [CausalConfig(), FIMConfig(rate=0.0), PrefixLMConfig(), MultiTokenConfig(steps_ahead=2)], ids=lambda c: c.name
)
def test_a_copy_task_reaches_zero_and_a_shifted_one_does_not(config):
    objective = config.build(vocabulary())
    width = objective.window(60).length
    examples = objective.examples(np.resize(CYCLE, (4, width)), SampleRandom(0, 0, np.arange(4)), 60)
    assert loss_of(perfect(1), examples, objective.attention) < 1e-6
    for wrong in (0, 2):  # the token itself (never shifted), the one after the next (shifted twice)
        assert loss_of(perfect(wrong), examples, objective.attention) > 50
    for step in range(1, 1 + objective.steps_ahead):
        assert loss_of(perfect(1 + step), examples, objective.attention, block=step) < 1e-6


@pytest.mark.parametrize(
    "config", [MLMConfig(), MLMConfig(unit=MLMUnit.span), MLMConfig(count=MLMCount.exact), MaskedDiffusionConfig()], ids=str
)
def test_masked_targets_stand_where_they_are_hidden(config):
    objective, examples = make(config)
    raw = windows(objective, 64, range(40)).astype(np.int64)
    target = examples.labels_BS != IGNORE
    assert target.any()
    assert np.array_equal(examples.labels_BS[target], raw[target])


# -- a mean over unequal label counts, the last partial window -----------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [CausalConfig(), FIMConfig(loss_on=FIMLoss.middle), MLMConfig(), MaskedDiffusionConfig(), MultiTokenConfig(), SpanCorruptionConfig()],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])  # 3 does not divide 16: the last micro-batch is a partial one
def test_gradients_are_equal_however_a_step_is_cut(config, micro_batch_size):
    """1 × 16 and 16 × 1: every micro-batch is divided by the count of the whole step, whatever its own count."""
    objective = config.build(vocabulary())
    source = SampleStream([Shard(stream(), np.zeros(0, np.int64))], objective, sequence_length=64, seed=0)
    size, steps = vocabulary().size, objective.steps_ahead
    backbone = TransformerConfig(d_model=16, num_layers=1, num_heads=2).build(vocab_size=size)
    backbone.reset_parameters(torch.Generator().manual_seed(0))
    head = DefaultLMHeadConfig(steps_ahead=steps).build(d_model=16, vocab_size=size)
    parameters = [*backbone.parameters(), *head.parameters()]

    def gradients(cut: int) -> list[torch.Tensor]:
        for p in parameters:
            p.grad = None
        batches = StepBatches(source, objective, sizes=BatchSizes(16, 16, 0, 1), micro_batch_size=cut, rank=0, world_size=1).step(3)
        assert len({b.step_targets for b in batches}) == 1
        for b in batches:
            output = head(
                backbone(b),
                labels=b.labels_BS,
                weights=b.weights_BS,
                loss_reduction="sum",
                loss_div_factor=b.step_targets,
                num_targets=b.num_targets,
            )
            output.loss.backward()
        return [p.grad.clone() for p in parameters]

    for whole, cut in zip(gradients(16), gradients(micro_batch_size), strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-7)


# -- the end of a document used as padding, and masked out ---------------------------------------------------------------


@pytest.mark.parametrize("config", [CausalConfig(), FIMConfig(rate=0.5), PrefixLMConfig(), SpanCorruptionConfig()], ids=lambda c: c.name)
def test_document_ends_are_learnt_even_where_padding_has_their_id(config):
    """Targets are left out by position, not by id."""
    v = replace(vocabulary(), padding=vocabulary().end_of_document)
    objective = config.build(v)
    examples = objective.examples(windows(objective, 128, range(60)), SampleRandom(0, 0, np.arange(60)), 128)
    assert (examples.labels_BS == v.end_of_document).any()
    assert (examples.labels_BS[examples.segments_BS == PADDING] == IGNORE).all()


# -- special ids past the vocabulary, padded rows predicted ----------------------------------------------------------------


@pytest.mark.parametrize("config", [BPEConfig(vocab_size=400, num_sentinels=10), ByteConfig(num_sentinels=10)], ids=lambda c: c.name)
def test_every_special_id_is_inside_the_vocabulary(config):
    v = config.build(["some text " * 20]).vocabulary
    named = [v.end_of_document, v.padding, v.mask, v.fim_prefix, v.fim_suffix, v.fim_middle, v.fim_end, *v.sentinels]
    assert None not in named
    assert len(set(named)) == len(named)
    assert all(0 <= token < v.size for token in named)
    assert v.special_V[named].all()


def test_padded_rows_of_a_tied_embedding_have_no_logits():
    embedding = torch.nn.Embedding(64, 16)
    head = DefaultLMHeadConfig(tie_embeddings=True).build(d_model=16, vocab_size=50, embedding=embedding)
    with torch.no_grad():
        embedding.weight[50:] = 100.0
    hidden = torch.ones(2, 3, 16)
    assert head(hidden).shape[-1] == 50
    with pytest.raises(ValueError, match="50"):
        head(hidden, labels=torch.full((2, 3), 50))
    loss = head(hidden, labels=torch.zeros(2, 3, dtype=torch.int64)).loss
    with torch.no_grad():
        embedding.weight[50:] = -100.0
    assert torch.equal(loss, head(hidden, labels=torch.zeros(2, 3, dtype=torch.int64)).loss)


# -- what a head or a loss does not have is refused, never ignored ---------------------------------------------------------


def test_a_tied_normalized_head_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"head\.tie_embeddings=true does not exist on head=normalized"):
        compose(["head=normalized", "head.tie_embeddings=true", "backbone=ngpt"])
