"""T5Model: Megatron-core's surface. Its parts equal the whole, padding and packing move nothing, ranks equal one process.

In fp64: what must be equal is then equal to nine digits, and a mistake has no rounding to hide in.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from test_loss_vocab_parallel import run_on
from torch import Tensor
from torch.distributed.tensor import init_device_mesh

from heads_lightning import AttentionMask, T5Config, T5LMHead, T5Model
from heads_lightning.batch import IGNORE, Attention, Batch
from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.configs.t5 import T5LMHeadConfig, T5Position, T5Preset
from heads_lightning.models.t5_parallel import parallelize
from heads_lightning.registry import ConfigError

V = 57
POSITIONS = list(T5Position)


def config(**options: Any) -> T5Config:
    return T5Config(**({"d_model": 32, "num_layers": 3, "num_heads": 4, "feed_forward_dim": 48} | options))


def fresh(given: T5Config, **options: Any) -> T5Model:
    return T5Model(given, **({"vocab_size": V} | options)).double().eval()


def build(given: T5Config | None = None, *, seed: int = 0, **options: Any) -> T5Model:
    """A model whose weights are large enough that a mistake in a mask shows."""
    model = fresh(config() if given is None else given, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.ndim == 2 else 1 + 0.2 * noise)
    return model


def draw(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(2, V, (rows, size), generator=torch.Generator().manual_seed(seed))


ENCODER, DECODER, LABELS = draw(2, 11), draw(2, 7, 1), draw(2, 7, 2)
LABELS[1, 4:] = IGNORE


def near(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


class TestSurface:
    def test_it_is_the_backbone_and_the_head(self) -> None:
        model = build()
        assert model.head is not None
        batch = Batch(DECODER, DECODER, Attention.encoder_decoder, 0, 0, encoder_tokens_BT=ENCODER)
        with torch.no_grad():
            assert torch.equal(model(ENCODER, DECODER), model.head(model.backbone(batch)))

    def test_the_loss_is_that_of_the_logits(self) -> None:
        model = build()
        logits = model(ENCODER, DECODER)
        want = F.cross_entropy(logits.view(-1, V), LABELS.view(-1), ignore_index=IGNORE, reduction="none").view(2, 7)
        assert near(model(ENCODER, DECODER, lm_labels=LABELS, loss_reduction="none"), want)
        assert near(model(ENCODER, DECODER, lm_labels=LABELS), want.sum() / 11)
        assert near(model.compute_language_model_loss(LABELS, logits), want)
        with pytest.raises(ValueError, match="label"):
            model(ENCODER, DECODER, lm_labels=torch.full_like(LABELS, V))
        with pytest.raises(ValueError, match="label"):
            model.compute_language_model_loss(torch.full_like(LABELS, V), logits)

    def test_encoder_states_are_returned_and_reused(self) -> None:
        model = build()
        states = model(ENCODER, None, output_encoder_hidden_only=True)
        assert states.shape == (2, 11, 32)
        assert torch.equal(model(None, DECODER, encoder_hidden_states=states), model(ENCODER, DECODER))

    def test_separate_configs(self) -> None:
        model = T5Model(config(num_layers=1, feed_forward_dim=24), config(num_layers=2), vocab_size=V)
        assert model.backbone.encoder is not None
        assert model.backbone.decoder is not None
        assert (len(model.backbone.encoder.blocks), len(model.backbone.decoder.blocks)) == (2, 1)
        assert (model.config.ff_dim, model.config.decoder_ff_dim) == (48, 24)
        with pytest.raises(ConfigError, match="num_heads"):
            T5Model(config(), config(num_heads=2), vocab_size=V)
        with pytest.raises(ConfigError, match="seq_len_interpolation_factor"):
            T5Model(config(), vocab_size=V, position_embedding_type="rope", seq_len_interpolation_factor=1.0)

    def test_a_bare_tensor_is_no_mask(self) -> None:
        with pytest.raises(TypeError, match=r"encoder_attn_mask is a bare Tensor.*from_blocked"):
            build()(ENCODER, DECODER, torch.ones(2, 11, 11, dtype=torch.bool))  # pyright: ignore[reportArgumentType]

    def test_masks_say_the_same_in_every_convention(self) -> None:
        keep = torch.ones(2, 11, dtype=torch.long)
        keep[1, 8:] = 0
        model = build()
        want = None
        blocked = (keep == 0)[:, None].expand(2, 11, 11)
        for mask in (AttentionMask.from_keep(keep), AttentionMask.from_blocked(blocked), AttentionMask.from_attend(~blocked)):
            got = model(ENCODER, DECODER, mask, None, mask if mask.visible_BST.shape[1] == 1 else AttentionMask(mask.visible_BST[:, :7]))
            want = got if want is None else want
            assert torch.equal(got, want)

    @pytest.mark.parametrize("positions", POSITIONS)
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_moves_nothing(self, positions: T5Position, side: str) -> None:
        model = build(config(position_embedding_type=positions))
        want = model(ENCODER, DECODER)
        pad = (3, 0) if side == "left" else (0, 3)
        encoder, decoder = F.pad(ENCODER, pad, value=0), F.pad(DECODER, pad, value=0)
        keep, own = F.pad(torch.ones_like(ENCODER), pad), F.pad(torch.ones_like(DECODER), pad)
        sees, sees_own = AttentionMask.from_keep(keep), AttentionMask.from_keep(own)
        got = model(encoder, decoder, sees, sees_own, sees)
        real = got[:, 3:] if side == "left" else got[:, :-3]
        assert near(real, want)
        assert got.isfinite().all()
        segments = {"encoder_segments": keep - 1, "decoder_segments": own - 1}
        got = model(encoder, decoder, **segments)
        assert near(got[:, 3:] if side == "left" else got[:, :-3], want)

    @pytest.mark.parametrize("positions", POSITIONS)
    def test_packed_sequences_are_computed_as_if_alone(self, positions: T5Position) -> None:
        model = build(config(position_embedding_type=positions))
        other, answer = draw(2, 5, 8), draw(2, 4, 9)
        segments = {
            "encoder_segments": torch.tensor([[0] * 11 + [1] * 5] * 2),
            "decoder_segments": torch.tensor([[0] * 7 + [1] * 4] * 2),
        }
        got = model(torch.cat((ENCODER, other), 1), torch.cat((DECODER, answer), 1), **segments)
        assert near(got[:, :7], model(ENCODER, DECODER))
        assert near(got[:, 7:], model(other, answer))

    def test_a_fully_padded_row_is_finite_forwards_and_backwards(self) -> None:
        model = build()
        keep = torch.ones_like(ENCODER)
        keep[0] = 0
        mask = AttentionMask.from_keep(keep)
        loss = model(ENCODER, DECODER, mask, None, mask, lm_labels=LABELS)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("positions", POSITIONS)
    def test_a_cache_reads_on(self, positions: T5Position) -> None:
        model = build(config(position_embedding_type=positions))
        keep = torch.ones_like(ENCODER)
        keep[1, 6:] = 0
        mask = AttentionMask.from_keep(keep)
        with torch.no_grad():
            want = model(ENCODER, DECODER, mask, None, mask)
            cache, pieces = model.new_cache(2, 7), []
            for start, stop in ((0, 3), (3, 4), (4, 7)):
                first = start == 0
                inputs = ENCODER if first else None
                pieces.append(model(inputs, DECODER[:, start:stop], mask, None, mask if first else None, cache=cache))
        assert near(torch.cat(pieces, 1), want)


class TestHead:
    hidden = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))

    def test_tied_or_not_with_or_without_bias(self) -> None:
        for preset in T5Preset:
            for tied in (True, False):
                for bias in (True, False):
                    given = T5LMHeadConfig(preset=preset, bias=bias)
                    head = T5LMHead(config(preset=preset), True, V, True, tied, head=given)
                    sizes = sorted(list(p.shape) for p in head.parameters())
                    assert sizes == sorted(([] if tied else [[V, 32]]) + ([[V]] if bias else []))

    def test_published_defaults(self) -> None:
        shapes = {preset: sorted(list(p.shape) for p in T5LMHead(config(preset=preset), False, V).parameters()) for preset in T5Preset}
        assert shapes == {"t5_v1_0": [], "t5_v1_1": [[V, 32]], "flan": [[V, 32]], "megatron": [[V]]}

    def test_forward(self) -> None:
        weight = torch.randn(V, 32, generator=torch.Generator().manual_seed(1))
        tied = T5LMHead(config(preset=T5Preset.t5_v1_0), True, V)
        assert near(tied(self.hidden, weight), self.hidden @ weight.T / 32**0.5, 1e-6)
        with pytest.raises(RuntimeError, match="tie"):
            tied(self.hidden)
        untied = T5LMHead(config(), True, V)
        assert near(untied(self.hidden), self.hidden @ untied.output.w_out.weight.T, 1e-6)
        with pytest.raises(ValueError, match="a weight of its own"):
            untied(self.hidden, weight)
        last_stage = T5LMHead(config(preset=T5Preset.megatron), True, V, pre_process=False)
        assert last_stage.word_embeddings is not None
        assert last_stage(self.hidden).shape == (3, 4, V)

    def test_the_loss_dtype_is_read(self) -> None:
        labels = draw(3, 4)
        losses, types = {}, {}
        for dtype in ("float32", "float64", "bfloat16"):
            torch.manual_seed(0)
            head = T5LMHeadConfig(loss_dtype=dtype, dtype="bfloat16").build(d_model=32, vocab_size=V)  # pyright: ignore
            types[dtype] = head(self.hidden.bfloat16()).dtype
            losses[dtype] = float(head(self.hidden.bfloat16(), labels=labels).loss)
        assert types == {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
        assert 0 < abs(losses["float32"] - losses["float64"]) < 1e-5
        assert 1e-5 < abs(losses["bfloat16"] - losses["float64"]) < 1e-2


class TestStages:
    @pytest.mark.parametrize("preset", list(T5Preset))
    def test_encoder_and_decoder_apart_equal_the_whole(self, preset: T5Preset) -> None:
        whole = build(config(preset=preset))
        first = fresh(whole.config, post_process=False, add_decoder=False)
        second = fresh(whole.config, add_encoder=False)
        self.share(whole, first, second)
        second.set_input_tensor(first(ENCODER, None))
        assert torch.equal(second(None, DECODER), whole(ENCODER, DECODER))
        assert torch.equal(second(None, DECODER, lm_labels=LABELS), whole(ENCODER, DECODER, lm_labels=LABELS))

    @pytest.mark.parametrize("tied", [True, False])
    def test_four_stages_equal_the_whole_gradients_included(self, tied: bool) -> None:
        whole = build(share_embeddings_and_output_weights=tied)
        given: dict[str, Any] = {"share_embeddings_and_output_weights": tied}
        stages = [
            fresh(whole.config, add_decoder=False, post_process=False, encoder_layers=range(0, 1), **given),
            fresh(whole.config, add_decoder=False, post_process=False, pre_process=False, encoder_layers=range(1, 3), **given),
            fresh(whole.config, add_encoder=False, post_process=False, decoder_layers=range(0, 2), **given),
            fresh(whole.config, add_encoder=False, pre_process=False, decoder_layers=range(2, 3), **given),
        ]
        self.share(whole, *stages)
        stages[1].set_input_tensor([stages[0](ENCODER, None)])
        memory = stages[1](None, None)
        stages[2].set_input_tensor(memory)
        stages[3].set_input_tensor([stages[2](None, DECODER), memory])
        loss, want = stages[3](None, None, lm_labels=LABELS), whole(ENCODER, DECODER, lm_labels=LABELS)
        assert near(loss, want)
        loss.backward()
        want.backward()
        for name, parameter in whole.named_parameters():
            held = [dict(stage.named_parameters()).get(name) for stage in stages]
            grads = [p.grad for p in held if p is not None and p.grad is not None]
            assert grads, name
            assert near(torch.stack(grads).sum(0), parameter.grad), name

    def test_what_a_stage_needs_is_said(self) -> None:
        decoder = T5Model(config(), vocab_size=V, add_encoder=False, pre_process=False, share_embeddings_and_output_weights=False)
        with pytest.raises(ValueError, match="nothing to look at"):
            decoder(None, DECODER)
        decoder.set_input_tensor(torch.zeros(2, 11, 32))
        with pytest.raises(ValueError, match="pre_process=True"):
            decoder(None, DECODER)
        with pytest.raises(ValueError, match="3 input tensors"):
            decoder.set_input_tensor([torch.zeros(1)] * 3)
        with pytest.raises(ValueError, match="encoder_input_ids"):
            build()(None, DECODER)

    @staticmethod
    def share(whole: T5Model, *stages: T5Model) -> None:
        """Every stage loads its part of the whole's parameters; together they hold all of them."""
        state, held = whole.state_dict(), set()
        for stage in stages:
            own = stage.state_dict()
            stage.load_state_dict({name: state[name] for name in own})
            held |= set(own)
        assert held == set(state)


def test_a_tied_weight_is_stored_once() -> None:
    model = build(config(preset=T5Preset.t5_v1_0))
    assert [name for name, value in model.sharded_state_dict().items() if value.shape == (V, 32)] == ["backbone.embedding.weight"]
    assert model.shared_embedding_or_output_weight() is model.backbone.embedding.weight


# -- two processes ------------------------------------------------------------------------------------------------------


def check_ranks(rank: int, world: int) -> None:
    """Loss, logits and gradients of two ranks against one process; checkpoints across layouts."""
    mesh = init_device_mesh("cpu", (world,))
    cases = [
        (T5Preset.t5_v1_1, LMLossImplementation.chunked, 0.0, 0.0),
        (T5Preset.t5_v1_0, LMLossImplementation.default, 0.1, 1e-2),
        (T5Preset.megatron, LMLossImplementation.chunked, 0.1, 1e-2),
    ]
    for preset, implementation, smoothing, z in cases:
        head = T5LMHeadConfig(preset=preset, loss_implementation=implementation, label_smoothing=smoothing, z_loss_multiplier=z)
        one = build(config(preset=preset), head=head)
        ranks = parallelize(build(config(preset=preset), head=head), mesh)
        gathered = parallelize(build(config(preset=preset), head=head, parallel_output=False), mesh)
        want = one(ENCODER, DECODER, lm_labels=LABELS)
        got = ranks(ENCODER, DECODER, lm_labels=LABELS)
        assert near(got, want), f"rank {rank}, {preset}: loss {got} and {want}"
        assert near(gathered(ENCODER, DECODER, lm_labels=LABELS), want), "parallel_output=False changes the loss"
        want.backward()
        got.backward()
        for name, parameter in ranks.named_parameters():
            grad: Any = parameter.grad
            grad, wanted = grad.full_tensor() if hasattr(grad, "full_tensor") else grad, dict(one.named_parameters())[name].grad
            floor = 1e-12  # a bias of all keys shifts a row of scores: its gradient is 0 but for rounding
            assert (grad - wanted).abs().max() <= 1e-9 * wanted.abs().max() + floor, f"rank {rank}, {preset}: gradient of {name}"
        logits, shard = one(ENCODER, DECODER), ranks(ENCODER, DECODER)
        assert shard.shape[-1] == (V + 1) // 2 - rank
        assert near(gathered(ENCODER, DECODER), logits)
        per_token = one(ENCODER, DECODER, lm_labels=LABELS, loss_reduction="none")
        assert near(ranks.compute_language_model_loss(LABELS, shard), per_token)
        with pytest.raises(ValueError, match="count once per rank"):
            ranks.compute_language_model_loss(LABELS, logits)
        with torch.no_grad():
            cache = ranks.new_cache(2, 7)
            pieces = [ranks(ENCODER, DECODER[:, :4], cache=cache), ranks(None, DECODER[:, 4:], cache=cache)]
        assert near(torch.cat(pieces, 1), shard)
        _check_checkpoint(ranks, preset, logits, mesh)
    with pytest.raises(ConfigError, match="num_heads=3"):
        parallelize(build(config(d_model=24, num_heads=3)), mesh)


def _check_checkpoint(ranks: T5Model, preset: T5Preset, logits: Tensor, mesh: Any) -> None:
    """Saved by two ranks, loaded by one model, by two pipeline stages and by two ranks; saved whole, loaded by two ranks."""
    folder = Path(os.environ["T5_CHECKPOINTS"]) / preset
    assert ranks.head is not None
    given: dict[str, Any] = {"head": ranks.head.config}
    dcp.save(ranks.sharded_state_dict(), checkpoint_id=folder / "two")
    whole = fresh(ranks.config, **given)
    stages = [fresh(ranks.config, add_decoder=False, post_process=False, **given), fresh(ranks.config, add_encoder=False, **given)]
    again = parallelize(fresh(ranks.config, **given), mesh)
    for model in (whole, *stages, again):
        dcp.load(model.sharded_state_dict(), checkpoint_id=folder / "two")
    assert near(whole(ENCODER, DECODER), logits)
    stages[1].set_input_tensor(stages[0](ENCODER, None))
    assert near(stages[1](None, DECODER), logits)
    shard = ranks(ENCODER, DECODER)
    assert torch.equal(again(ENCODER, DECODER), shard)
    dcp.save(whole.sharded_state_dict(), checkpoint_id=folder / "one")
    late = parallelize(fresh(ranks.config, **given), mesh)
    dcp.load(late.sharded_state_dict(), checkpoint_id=folder / "one")
    assert torch.equal(late(ENCODER, DECODER), shard)
    dist.barrier()


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T5_CHECKPOINTS", str(tmp_path))
    run_on(2, check_ranks)
