"""T5: equal to transformers' T5ForConditionalGeneration in logits, loss, gradients and greedy decoding; every option; masks; parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heads_lightning.backbones.masks import AttentionMask, t5_extended_attention_mask, t5_position_ids
from heads_lightning.backbones.t5 import T5
from heads_lightning.batch import IGNORE, PADDING, Attention, Batch
from heads_lightning.composition import compose
from heads_lightning.configs.base import NormType
from heads_lightning.configs.layers import FeedForward
from heads_lightning.configs.t5 import T5Config, T5LMHeadConfig, T5Position, T5Preset
from heads_lightning.generation import generate
from heads_lightning.registry import ConfigError
from heads_lightning.testing import check_backbone, check_head

V = 61
SMALL: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 4}
PRESETS = [T5Preset.t5_v1_0, T5Preset.t5_v1_1]

transformers = pytest.importorskip("transformers")


def huggingface(preset: T5Preset, seed: int = 0, gain: float = 1.0, decoder_layers: int = 3) -> Any:
    """A tiny random T5ForConditionalGeneration of a preset, with uneven norms and strong relative positions.

    `gain` enlarges the matrices: answers vary more, and fp32 rounding grows with every layer.
    """
    v1_0 = preset == T5Preset.t5_v1_0
    config = transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=10, d_ff=48, num_layers=2, num_decoder_layers=decoder_layers, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
        feed_forward_proj="relu" if v1_0 else "gated-gelu", tie_word_embeddings=v1_0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not v1_0:  # transformers ties whatever the config says, unless a checkpoint brings a head of its own
        model.lm_head.weight = torch.nn.Parameter(torch.randn(V, 32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif "relative_attention_bias" in name:
                parameter.mul_(10)
            elif "shared" not in name and "lm_head" not in name:
                parameter.mul_(gain)
    return model


def imported(preset: T5Preset, theirs: Any) -> tuple[Any, Any]:
    """Our model with the weights of theirs."""
    config = T5Config(
        preset=preset, d_model=32, num_layers=2, num_heads=4, head_dim=10,
        num_decoder_layers=theirs.config.num_decoder_layers, feed_forward_dim=48,
        relative_buckets=8, relative_max_distance=20,
    )  # fmt: skip
    backbone = config.build(vocab_size=V)
    head_config = T5LMHeadConfig(preset=preset)
    head = head_config.build(d_model=32, vocab_size=V, embedding=backbone.embedding if head_config.is_tied else None)
    state = theirs.state_dict()
    backbone.load_state_dict(from_huggingface(state, gated=preset != T5Preset.t5_v1_0))
    if not head_config.is_tied:
        head.load_state_dict({"w_out.weight": state["lm_head.weight"]})
    return backbone.eval(), head.eval()


def from_huggingface(state: dict[str, Tensor], *, gated: bool) -> dict[str, Tensor]:
    """Names of transformers to ours."""
    up, gate = ("wi_1", "wi_0") if gated else ("wi", None)
    parts = {"q": "query", "k": "key", "v": "value", "o": "output"}
    ours = {"embedding.weight": state["shared.weight"]}
    for stack, branches in (("encoder", ["attention"]), ("decoder", ["attention", "cross_attention"])):
        ours[f"{stack}.relative_bias.weight"] = state[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        ours[f"{stack}.norm.weight"] = state[f"{stack}.final_layer_norm.weight"]
        for i in {int(name.split(".")[2]) for name in state if name.startswith(f"{stack}.block.")}:
            here, there = f"{stack}.blocks.{i}", f"{stack}.block.{i}.layer"
            for place, branch in enumerate([*branches, "feed_forward"]):
                ours[f"{here}.{branch}_norm.weight"] = state[f"{there}.{place}.layer_norm.weight"]
                if branch != "feed_forward":
                    name = "EncDecAttention" if branch == "cross_attention" else "SelfAttention"
                    ours |= {f"{here}.{branch}.{mine}.weight": state[f"{there}.{place}.{name}.{q}.weight"] for q, mine in parts.items()}
            dense = f"{there}.{len(branches)}.DenseReluDense"
            ours[f"{here}.feed_forward.up.weight"] = state[f"{dense}.{up}.weight"]
            ours[f"{here}.feed_forward.down.weight"] = state[f"{dense}.wo.weight"]
            if gate:
                ours[f"{here}.feed_forward.gate.weight"] = state[f"{dense}.{gate}.weight"]
    return ours


def draw(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(2, V, (rows, size), generator=torch.Generator().manual_seed(seed))


def padded_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder tokens and keep mask, decoder input, labels with IGNORE: rows of unequal length, padded on the right."""
    encoder, labels = draw(3, 29), draw(3, 17, 1)
    keep = torch.ones_like(encoder)
    keep[1, 20:] = keep[2, 5:] = 0
    labels[1, 11:] = IGNORE
    decoder = torch.cat((torch.zeros(3, 1, dtype=torch.long), labels.clamp(min=0)[:, :-1]), dim=1)
    return encoder, keep, decoder, labels


def read(backbone: T5, encoder: Tensor, decoder: Tensor, keep: Tensor | None = None, **given: Any) -> Tensor:
    segments = None if keep is None else torch.where(keep == 1, 0, PADDING)
    batch = Batch(decoder, decoder, Attention.encoder_decoder, 0, 0, encoder_tokens_BT=encoder, encoder_segments_BT=segments, **given)
    return backbone(batch)


@pytest.mark.parametrize("preset", PRESETS)
class TestParity:
    def test_logits_loss_and_gradients(self, preset: T5Preset) -> None:
        theirs = huggingface(preset)
        backbone, head = imported(preset, theirs)
        encoder, keep, decoder, labels = padded_case()
        want = theirs(input_ids=encoder, attention_mask=keep, decoder_input_ids=decoder, labels=labels)
        hidden = read(backbone, encoder, decoder, keep)
        got = head(hidden, labels=labels, return_logits=True)
        assert (got.logits - want.logits).abs().max() <= 1e-5 * want.logits.abs().max()
        assert abs(got.loss - want.loss) <= 1e-5 * abs(want.loss)
        got.loss.backward()
        want.loss.backward()
        grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        wanted = from_huggingface({n: g for n, g in grads.items() if g is not None}, gated=preset != T5Preset.t5_v1_0)
        for name, parameter in backbone.named_parameters():
            error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
            assert error <= 1e-5, f"gradient of {name}: relative error {error:.1e}"
        if not head.config.is_tied:
            assert (head.w_out.weight.grad - grads["lm_head.weight"]).norm() <= 1e-5 * grads["lm_head.weight"].norm()

    @pytest.mark.parametrize("cached", [True, False])
    def test_greedy_decoding(self, preset: T5Preset, cached: bool) -> None:
        theirs = huggingface(preset, seed=3, gain=2.0, decoder_layers=2)  # its cache has as many layers as the encoder
        backbone, head = imported(preset, theirs)
        prompts = [draw(1, size, seed=size)[0].tolist() for size in (9, 21, 14)]
        for prompt in prompts:
            want = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, use_cache=cached)[0, 1:].tolist()
            want = want[: want.index(1)] if 1 in want else want
            got = generate(
                backbone, head, [prompt], decoder_prompts=[[0]], max_new_tokens=24, stop_ids=[1], attention=Attention.encoder_decoder
            )
            assert got == [want]
            assert got == [self.again(backbone, head, prompt, 24)]
        together = generate(
            backbone, head, prompts, decoder_prompts=[[0]] * 3, max_new_tokens=24, stop_ids=[1], attention=Attention.encoder_decoder
        )
        assert together == [self.again(backbone, head, prompt, 24) for prompt in prompts]

    @staticmethod
    def again(backbone: T5, head: Any, prompt: list[int], count: int) -> list[int]:
        """Greedy decoding that reads everything again for every token."""
        written = [0]
        with torch.no_grad():
            for _ in range(count):
                token = int(head(read(backbone, torch.tensor([prompt]), torch.tensor([written])))[0, -1].argmax())
                if token == 1:
                    break
                written.append(token)
        return written[1:]


OPTIONS: list[dict[str, Any]] = [
    {"preset": T5Preset.t5_v1_0},
    {"preset": T5Preset.megatron},
    {"position_embedding_type": T5Position.rope},
    {"position_embedding_type": T5Position.rope, "rotary_percent": 0.5, "seq_len_interpolation_factor": 2.0},
    {"num_decoder_layers": 1, "feed_forward_dim": 40, "decoder_feed_forward_dim": 24, "head_dim": 6},
    {"norm": NormType.layer_norm, "bias": True, "feed_forward": FeedForward.plain, "scale_attention": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_option_keeps_the_contract(options: dict[str, Any]) -> None:
    check_backbone(T5Config(**(SMALL | options)))


@pytest.mark.parametrize("preset", list(T5Preset))
def test_head_of_every_preset(preset: T5Preset) -> None:
    check_head(T5LMHeadConfig(preset=preset))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", list(T5Preset))
def test_a_new_model_begins_near_ln_v(preset: T5Preset, tied: bool) -> None:
    torch.manual_seed(0)
    config = T5Config(preset=preset, d_model=64, num_layers=2, num_heads=4).fitted(tied=tied)
    assert config.embedding_init_std == (0.02 if tied or preset == T5Preset.megatron else 1.0)
    backbone = config.build(vocab_size=256)
    head = T5LMHeadConfig(preset=preset, tie_embeddings=tied).build(
        d_model=64, vocab_size=256, embedding=backbone.embedding if tied else None
    )
    tokens = torch.randint(0, 256, (8, 40))
    loss = float(head(read(backbone, tokens, tokens), labels=tokens.roll(-1, 1)).loss)
    assert abs(loss - math.log(256)) <= 0.1 * math.log(256)


def test_an_experiments_embeddings_fit_its_head() -> None:
    for tie, std in (([], 1.0), (["head.tie_embeddings=true"], 0.02)):
        backbone = compose(["objective=span_corruption", "backbone=t5", "head=t5", *tie]).backbone
        assert isinstance(backbone, T5Config)
        assert backbone.embedding_init_std == std


def test_dropout_acts_in_training_alone_and_everywhere() -> None:
    torch.manual_seed(0)
    model = T5Config(**SMALL, dropout=0.3).build(vocab_size=V)
    plain = T5Config(**SMALL).build(vocab_size=V)
    plain.load_state_dict(model.state_dict())
    tokens = draw(2, 12)
    assert torch.equal(read(model.eval(), tokens, tokens), read(plain.eval(), tokens, tokens))
    one, other = (read(model.train(), tokens, tokens) for _ in range(2))
    assert not torch.allclose(one, other)
    one.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len_interpolation_factor": 0.5}, "more than 1"),
        ({"position_embedding_type": T5Position.rope, "rotary_percent": 0.1}, "rotary_percent=0.1"),
        ({"d_model": 30}, "not divisible"),
        ({"relative_buckets": 6}, "a multiple of 4"),
        ({"relative_max_distance": 16}, "more than relative_buckets / 2"),
        ({"num_decoder_layers": 0}, "1 or more"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        T5Config(**(SMALL | options))


class TestMasks:
    visible = torch.tensor([[[True, False, False], [True, True, False]]])

    def test_the_four_conventions_say_the_same(self) -> None:
        blocked = ~self.visible
        additive = torch.zeros(1, 2, 3).masked_fill(blocked, float("-inf"))
        masks = [
            AttentionMask.from_blocked(blocked),
            AttentionMask.from_attend(self.visible),
            AttentionMask.from_keep(self.visible.long()),
            AttentionMask.from_additive(additive),
            AttentionMask.from_additive(torch.where(self.visible, 0.0, -10000.0)[:, None]),
            AttentionMask(self.visible),
        ]
        for mask in masks:
            assert torch.equal(mask.visible_BST, self.visible)
            assert torch.equal(mask.blocked(), blocked[:, None])
            assert torch.equal(mask.attend(), self.visible[:, None])
            assert torch.equal(mask.keep(), self.visible.long())
            assert torch.equal(mask.additive(torch.float32) == 0, self.visible[:, None])
            for name in ("blocked", "attend"):
                again = getattr(AttentionMask, f"from_{name}")(getattr(mask, name)())
                assert torch.equal(again.visible_BST, self.visible)

    def test_a_tensor_of_another_convention_is_refused(self) -> None:
        with pytest.raises(TypeError, match="from_keep"):
            AttentionMask.from_blocked(torch.ones(1, 2, 3, dtype=torch.long))
        with pytest.raises(TypeError, match="from_attend or from_blocked"):
            AttentionMask.from_keep(self.visible)
        with pytest.raises(ValueError, match="token ids"):
            AttentionMask.from_keep(torch.tensor([[5, 7, 0]]))
        with pytest.raises(TypeError, match="floating"):
            AttentionMask.from_additive(self.visible)
        with pytest.raises(ValueError, match="bias"):
            AttentionMask.from_additive(torch.tensor([[[0.0, -1.5]]]))
        with pytest.raises(TypeError, match="from_blocked"):
            AttentionMask(self.visible.float())

    def test_extended(self) -> None:
        one = torch.ones(2, 3, 3, dtype=torch.bool).tril()
        extended = t5_extended_attention_mask([one, None])
        assert extended[1] is None
        assert extended[0] is not None
        assert extended[0].shape == (2, 1, 3, 3)
        assert torch.equal(extended[0][:, 0], one)

    def test_position_ids(self) -> None:
        tokens = torch.tensor([[0, 0, 5, 6], [7, 0, 8, 9]])
        assert t5_position_ids(tokens).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
        assert t5_position_ids(tokens, padding_id=0).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
        assert t5_position_ids(tokens, segments=torch.tensor([[-1, -1, 0, 0], [0, 0, 1, 1]])).tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
