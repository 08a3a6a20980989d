"""The contract of a backbone. Leaks are sought in fp64 with enlarged weights: at the usual ones a leak can hide in fp32's rounding."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from heads_lightning.batch import PADDING, Attention, Batch
from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.testing.base import assert_near, check_module
from heads_lightning.testing.encoder_decoders import check_encoder_decoder

LEAK, SEEN = 1e-10, 1e-6
"""Changes of fp64 hidden states: below the first is rounding (a convolution by FFT has some everywhere), above the second is influence."""


def check_backbone(config: BackboneConfig, *, vocab_size: int = 61) -> None:
    """backbones.base.Backbone, for every attention kind that the config supports."""
    check_module(lambda init_device: config.build(vocab_size=vocab_size, init_device=init_device), config.num_params(vocab_size))
    supported = sorted(config.attention_supported())
    assert supported, f"backbone={config.name} supports no attention"
    model = enlarged(config, vocab_size)
    assert list(model.embedding.weight.shape) == [vocab_size, config.d_model], "the embedding is not [V, D]"
    declared = config.d_model, type(config.described()).supports
    assert (model.d_model, model.supports) == declared, "module and config disagree on d_model or supports"
    one_sequence = [attention for attention in supported if attention != Attention.encoder_decoder]
    for attention in one_sequence:
        check_sight(model, attention)
    for attention in one_sequence:
        check_isolation(model, attention)
    if len(one_sequence) < len(supported):
        check_encoder_decoder(model)
    if reads_on := {Attention.causal, Attention.prefix} & set(supported):
        _check_cache(model, min(reads_on))
    _check_backbone_training(config, supported[0], vocab_size)


def enlarged(config: BackboneConfig, vocab_size: int = 61, dtype: torch.dtype = torch.float64, gain: float = 8.0, seed: int = 0) -> Any:
    """A built backbone in evaluation mode with its matrices enlarged and its vectors made uneven."""
    model, generator = config.build(vocab_size=vocab_size), torch.Generator().manual_seed(seed)
    model.reset_parameters(generator)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator).to(dtype)
            parameter.mul_(gain) if parameter.ndim == 2 else parameter.mul_(0.5 + noise)
    model.after_optimizer_step()
    return model


def draw_tokens(rows: int, size: int, seed: int = 1) -> Tensor:
    """Random ids below 61, [rows, size]."""
    return torch.randint(0, 61, (rows, size), generator=torch.Generator().manual_seed(seed))


def batch_of(tokens_BS: Tensor, attention: Attention = Attention.causal, **given: Any) -> Batch:
    """A batch without targets; an encoder reads the same tokens when none are given."""
    if attention == Attention.encoder_decoder:
        given.setdefault("encoder_tokens_BT", tokens_BS)
    return Batch(tokens_BS, tokens_BS, attention, 0, 0, **given)


def changed_at(model: nn.Module, one: Batch, other: Batch) -> Tensor:
    """[S]: largest change of the hidden state of each position between two batches."""
    with torch.no_grad():
        return (model(one) - model(other)).abs().amax(dim=(0, 2))


def check_sight(model: nn.Module, attention: Attention) -> None:
    one, prefix = draw_tokens(2, 24), (torch.arange(24) < 10).expand(2, 24)
    for at in (0, 9, 10, 23):
        other = one.clone()
        other[:, at] = (other[:, at] + 1) % 61
        change = changed_at(model, batch_of(one, attention, prefix_BS=prefix), batch_of(other, attention, prefix_BS=prefix))
        first = 0 if attention == Attention.bidirectional or (attention == Attention.prefix and at < 10) else at
        leaked = (change[:first] > LEAK).nonzero().flatten().tolist()
        assert not leaked, f"attention={attention}: positions {leaked} see position {at}, which comes after them"
        for seer in {at, min(at + 1, 23), max(at - 1, first)}:  # the control: the same probe sees what may be seen, the future included
            assert change[seer] > SEEN, f"attention={attention}: position {seer} does not see position {at}, which it should"


def check_isolation(model: nn.Module, attention: Attention) -> None:
    one, what = draw_tokens(2, 24), f"attention={attention}"
    prefix = torch.zeros(2, 24, dtype=torch.bool)
    prefix[:, :3] = prefix[:, 7:12] = True
    for places, name in (([0, 1, 2], "packed"), ([PADDING, 0, 1], "padded on the left"), ([0, 1, PADDING], "padded on the right")):
        segments = torch.repeat_interleave(torch.tensor(places), torch.tensor([7, 12, 5])).expand(2, 24).int()
        whole = batch_of(one, attention, segments_BS=segments, prefix_BS=prefix)
        for start, end, place in ((0, 7, places[0]), (7, 19, places[1]), (19, 24, places[2])):
            part, other = slice(start, end), one.clone()
            other[:, part] = draw_tokens(2, end - start, seed=9)
            change = changed_at(model, whole, whole._replace(tokens_BS=other))
            outside = torch.cat((change[:start], change[end:]))
            assert change[part].max() > SEEN, f"{what}, {name}: other tokens change nothing"
            assert not (outside > LEAK).any(), f"{what}, {name}: segments see each other"
            with torch.no_grad():
                hidden, alone = model(whole), model(batch_of(one[:, part], attention, prefix_BS=prefix[:, part]))
            assert hidden.isfinite().all(), f"{what}, {name}: hidden states are not finite"
            if place != PADDING:
                assert_near(hidden[:, part], alone, 1e-9, f"{what}, {name}: a segment against itself alone (its positions count from 0)")


def _check_cache(model: Any, attention: Attention) -> None:
    one, none = draw_tokens(2, 14), torch.zeros(2, 14, dtype=torch.bool)
    padded = torch.tensor([[PADDING] * 4 + [0] * 10, [0] * 14]).int()
    for segments in (None, padded):
        with torch.no_grad():
            whole = model(batch_of(one, attention, segments_BS=segments, prefix_BS=none))
            for steps in ([11, 1, 1, 1], [5, 4, 5]):
                cache, done, pieces = model.new_cache(2, 14), 0, []
                for size in steps:
                    part, done = slice(done, done + size), done + size
                    given = None if segments is None or done > size else segments[:, part]  # later batches may leave them out
                    pieces.append(model(batch_of(one[:, part], attention, segments_BS=given, prefix_BS=none[:, part]), cache))
                    assert cache.length == done, f"a cache that has read {done} positions says {cache.length}"
                kind = "a cache" if segments is None else "a cache, padded on the left"
                assert_near(torch.cat(pieces, 1), whole, 1e-9, f"{kind}: reading {steps} positions against reading them at once")


def _check_backbone_training(config: BackboneConfig, attention: Attention, vocab_size: int) -> None:
    model, size = enlarged(config, vocab_size, torch.float32, gain=2.0).train(), 2 * vocab_size
    one = batch_of(torch.arange(size).remainder(vocab_size).view(2, -1), attention, prefix_BS=torch.zeros(2, size // 2, dtype=torch.bool))
    segments = torch.zeros_like(one.tokens_BS)
    segments[1, 20:] = PADDING
    upstream = torch.randn(config.d_model, generator=torch.Generator().manual_seed(0))
    (model(one._replace(segments_BS=segments)) * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.any(), f"the gradient of {name} is 0"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = model.eval()(one)
    with torch.no_grad():
        exact, rounded = model(one), copy.deepcopy(model).bfloat16().float()(one)
    by_weights = float((rounded - exact).norm() / exact.norm())  # how much this network makes of rounding, by that of its weights alone
    assert_near(rough, exact, max(0.04, 3 * by_weights), "bf16 autocast against fp32 (rounding is 0.4 % a layer)")
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(one).sum().backward()
    counted, said = counter.get_total_flops() / size, config.num_flops_per_token(size // 2)
    assert abs(said - counted) <= 0.02 * counted, f"num_flops_per_token says {said}, PyTorch counts {counted:.0f}"
