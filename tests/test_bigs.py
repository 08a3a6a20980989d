"""BiGS against its definition: kernel, convolution, block, causal forms, recurrence, precision, padding and packing, optimizer groups.

The definition is written out here in complex arithmetic, with the flips and names of the published description, as slowly as it reads.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heads_lightning.backbones import fourier, ssm
from heads_lightning.backbones.bigs import BiGS
from heads_lightning.backbones.ssm import S4D
from heads_lightning.batch import PADDING, Attention
from heads_lightning.composition import compose
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.layers import CausalForm, Convolution, Direction, GateActivation, Position
from heads_lightning.registry import ConfigError, RunError
from heads_lightning.testing import check_leaks
from heads_lightning.testing.backbones import batch_of, changed_at, draw_tokens, enlarged
from heads_lightning.testing.leaks import perturbation_influence

VOCAB = 61
TINY = BiGSBackboneConfig(d_model=16, num_layers=2, inner_dim=24, state_size=8, max_positions=64)
CAUSAL = replace(TINY, direction=Direction.causal)
FORMS = {form.value: replace(CAUSAL, causal_form=form) for form in CausalForm}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small wait for threads more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def system_of(modes: int = 64, seed: int = 0, log_step: float = math.log(0.05), dtype: torch.dtype = torch.float64) -> S4D:
    made = S4D(modes)
    made.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.log_step.fill_(log_step)
        made.A_re.mul_(torch.linspace(0.5, 2.0, modes))
        made.D.fill_(0.7)
    return made.to(dtype)


def modes_of(system: S4D) -> tuple[Tensor, Tensor, Tensor]:
    """λ and the gain of each mode, complex, as the paper has them; and dt·A."""
    A = torch.complex(system.A_re.clamp(max=-1e-4), system.A_im)
    C = torch.complex(system.C[:, 0], system.C[:, 1])
    rate = A * system.log_step.exp()
    return rate, C * (torch.exp(rate) - 1) / A, A


def complex_kernel(system: S4D, length: int) -> Tensor:
    rate, gain, _ = modes_of(system)
    powers = torch.exp(rate[:, None] * torch.arange(length))
    return (gain[:, None] * powers).sum(0).real


def direct_sum(u_BSD: Tensor, kernel: Tensor) -> Tensor:
    pieces = [torch.einsum("s,bsd->bd", kernel[: t + 1].flip(0), u_BSD[:, : t + 1]) for t in range(u_BSD.shape[1])]
    return torch.stack(pieces, 1)


def recurrence(u_BSD: Tensor, system: S4D) -> Tensor:
    rate, gain, _ = modes_of(system)
    x, pieces = torch.zeros(u_BSD.shape[0], rate.shape[0], u_BSD.shape[2], dtype=torch.complex128), []
    for u_BD in u_BSD.unbind(1):
        x = x * torch.exp(rate)[:, None] + u_BD[:, None]
        pieces.append((gain[:, None] * x).sum(1).real)
    return torch.stack(pieces, 1)


def reference_block(block: Any, x_BSD: Tensor, direction: str, form: str) -> Tensor:
    """One block with flips and direct sums, in the gate's own activation."""
    h, flip = block.norm(x_BSD), direction == "bidirectional"

    def run(system: S4D, u: Tensor) -> Tensor:
        return direct_sum(u, complex_kernel(system, u.shape[1])) + system.D * u

    gate = block.gate
    f = block.forward_out(run(block.forward_system, gate(block.forward_in(h))))
    if direction == "causal" and form == "single":
        mixed = f
    else:
        ub = gate(block.backward_in(h.flip(1) if flip else h))
        if block.backward_system is not None:
            ub = run(block.backward_system, ub)
        b = block.backward_out(ub)
        mixed = f * (b.flip(1) if flip else b)
    return x_BSD + block.output(gate(block.expand(mixed)) * gate(block.value(h)))


# ---- kernel and convolution (B1, B2, B3)


@pytest.mark.parametrize("length", [1, 2, 50, 129, 1000])
def test_real_kernel_equals_the_complex_formula(length: int) -> None:
    system = system_of()
    torch.testing.assert_close(system.system().kernel(length), complex_kernel(system, length), rtol=1e-12, atol=1e-13)
    coarse = system_of(dtype=torch.float32)
    exact = complex_kernel(coarse.double(), length)
    assert (system_of(dtype=torch.float32).system().kernel(length).float() - exact).norm() <= 1e-6 * exact.norm()


def test_gradients_of_the_kernel_equal_those_of_the_complex_formula() -> None:
    system, upstream = system_of(), torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    leaves = [system.log_step, system.A_re, system.A_im, system.C]
    ours = torch.autograd.grad(system.system().kernel(200) @ upstream, leaves)
    theirs = torch.autograd.grad(complex_kernel(system, 200) @ upstream, leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("log_step", [math.log(0.01), 0.0])
def test_the_kernel_keeps_six_digits_far_away(log_step: float) -> None:
    """4096 steps and modes that hardly decay: in fp32 the angle alone would cost three of them."""
    system = system_of(log_step=log_step, dtype=torch.float32)
    with torch.no_grad():
        system.A_re.fill_(-1e-4)
    exact = complex_kernel(system_cast(system), 4096)
    assert (system.system().kernel(4096).float() - exact).norm() <= 1e-6 * exact.norm()


def test_a_mode_never_grows() -> None:
    """Learning may carry Re A above zero; the published models hold it at −0.0001."""
    system, held = system_of(8), system_of(8)
    with torch.no_grad():
        system.A_re[::2] = 3.0
        held.A_re[::2] = -1e-4
    assert torch.equal(system.system().kernel(200), held.system().kernel(200))


def test_a_new_system_is_s4d_lin() -> None:
    small = [S4D(1) for _ in range(200)]
    for seed, one in enumerate(small):
        one.reset_parameters(torch.Generator().manual_seed(seed))
    steps = torch.cat([one.log_step.detach().exp() for one in small])
    assert 0.01 <= steps.min() < 0.012
    assert 0.85 < steps.max() <= 1.0
    system = S4D(512)
    system.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(system.A_re, torch.full((512,), -0.5))
    torch.testing.assert_close(system.A_im, math.pi * torch.arange(512))
    assert float(system.C.detach().square().sum(1).mean()) == pytest.approx(1.0, rel=0.2)
    assert float(system.D.detach()) == 1.0


def system_cast(system: S4D) -> S4D:
    """A copy in fp64."""
    made = S4D(system.A_re.shape[0])
    made.load_state_dict(system.state_dict())
    return made.double()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 50, 300, 700])
def test_every_convolution_is_the_direct_sum_and_the_recurrence(length: int, reverse: bool) -> None:
    system = system_of()
    u = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flipped = u.flip(1) if reverse else u
    want = direct_sum(flipped, complex_kernel(system, length)) + system.D * flipped
    torch.testing.assert_close(recurrence(flipped, system) + system.D * flipped, want, rtol=1e-11, atol=1e-11)
    want = want.flip(1) if reverse else want
    discrete = system.system()
    ways = {
        "fft": ssm.fft_convolution(u, discrete.response(length), reverse),
        "toeplitz": ssm.toeplitz_convolution(u, discrete, segments_BS=None, reverse=reverse),
        "chunked": ssm.chunked_convolution(flipped, discrete, segments_BS=None),
    }
    ways["chunked"] = ways["chunked"].flip(1) if reverse else ways["chunked"]
    for form in Convolution:
        ways[form.value + " chosen"] = ssm.convolve(u, discrete, form=form, segments_BS=None, reverse=reverse)
    for name, got in ways.items():
        assert (got - want).abs().max() <= 1e-12 * want.abs().max().clamp(min=1), name
    single = ssm.convolve(u.float(), discrete, form=Convolution.auto, segments_BS=None, reverse=reverse)
    assert (single - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("length", [40, 700])
@pytest.mark.parametrize("form", [Convolution.fft, Convolution.chunked])
def test_gradients_of_the_convolutions_agree(form: Convolution, length: int) -> None:
    generator = torch.Generator().manual_seed(2)
    u, upstream = (torch.randn(2, length, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    results = []
    for way in ("ours", "matrix"):
        for reverse in (False, True):
            system, given = system_of(8), u.clone().requires_grad_()
            if way == "ours":
                y = ssm.convolve(given, system.system(), form=form, segments_BS=None, reverse=reverse)
            else:
                matrix = ssm.toeplitz(complex_kernel(system, length)) + system.D * torch.eye(length)
                y = (matrix.T if reverse else matrix) @ given
            results.append(torch.autograd.grad(y, [given, *system.parameters()], upstream))
    for ours, matrix in zip(results[:2], results[2:], strict=True):
        for mine, other in zip(ours, matrix, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("transforms", [1, 2, 3, 8], ids=lambda n: f"{n} at a time")
def test_blocks_of_transforms_are_those_made_at_once(monkeypatch: pytest.MonkeyPatch, transforms: int) -> None:
    """5 rows of 3 pairs: some pairs of a row, a row, several rows; the last block is smaller."""
    generator, found = torch.Generator().manual_seed(0), []
    u, kernel, upstream = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 9, 6), (9,), (5, 9, 6)))
    for at_once in (100, transforms):
        monkeypatch.setattr(fourier, "CACHED_BYTES", at_once * fourier.fast_size(18) * 16)
        given = u.clone().requires_grad_(), kernel.clone().requires_grad_()
        y = ssm.fft_convolution(*given, False)
        found.append((y, *torch.autograd.grad(y, given, upstream)))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)


def test_shapes_and_published_sizes() -> None:
    """347,756,950 with the pooler that is never trained; num_params of the config and of what is built agree (test_backbones)."""
    made = {name: tuple(p.shape) for name, p in S4D(64).named_parameters()}
    assert made == {"log_step": (1,), "A_re": (64,), "A_im": (64,), "C": (64, 2), "D": (1,)}
    head = 1024 * 1024 + 1024 + 2 * 1024 + 30522  # dense layer, norm, bias; the matrix is the embedding's
    for length, whole in ((128, 347_363_734), (512, 347_756_950), (1024, 348_281_238), (4096, 351_426_966)):
        config = compose([f"backbone=bigs_large_{length}", "objective=mlm", "data.sequence_length=128"]).backbone
        pooler = 1024 * 1024 + 1024
        assert config.num_params(30522) + head + pooler == whole
        if length == 512:
            assert config.num_params(30522) + head == 346_707_350


# ---- the block and the model


@pytest.mark.parametrize("name", ["bidirectional", *FORMS])
@pytest.mark.parametrize("activation", list(GateActivation))
def test_the_model_is_the_published_formula(name: str, activation: GateActivation) -> None:
    config = replace(FORMS.get(name, TINY), gate_activation=activation, num_token_types=2)
    model, tokens = enlarged(config), draw_tokens(2, 20)
    attention = Attention(config.direction.value)
    with torch.no_grad():
        h = model.embedding(tokens) + model.positions.weight[:20] + model.token_types.weight[0]
        h = F.layer_norm(h, (16,), model.embedding_norm.weight, model.embedding_norm.bias, 1e-12)
        for block in model.blocks:
            h = reference_block(block, h, config.direction.value, config.causal_form.value)
        torch.testing.assert_close(model(batch_of(tokens, attention)), model.norm(h), rtol=1e-9, atol=1e-9)


def test_gate_activations_differ_a_little() -> None:
    outputs = []
    for activation in GateActivation:
        model = enlarged(replace(TINY, gate_activation=activation), gain=8.0)
        with torch.no_grad():
            outputs.append(model(batch_of(draw_tokens(2, 20), Attention.bidirectional)))
    difference = (outputs[0] - outputs[1]).abs().max()
    assert 1e-4 < difference < 1e-1


def test_a_hook_on_a_block_fires_once_a_forward_pass() -> None:
    model, fired = TINY.build(vocab_size=VOCAB), []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: fired.append(number))
    model(batch_of(draw_tokens(2, 8), Attention.bidirectional))
    assert fired == [0, 1]


def test_every_parameter_learns_in_masked_language_modelling() -> None:
    model = TINY.build(vocab_size=VOCAB)
    (model(batch_of(draw_tokens(2, 40), Attention.bidirectional)) * torch.randn(16)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- padding, packing


@pytest.mark.parametrize("config", [TINY, CAUSAL], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(config: BiGSBackboneConfig, side: str) -> None:
    model, real, pads = enlarged(config, dtype=torch.float32, gain=6.0), draw_tokens(2, 20), draw_tokens(2, 12, seed=3)
    tokens = torch.cat((pads, real) if side == "left" else (real, pads), 1)
    content = slice(12, 32) if side == "left" else slice(0, 20)
    segments = torch.full_like(tokens, PADDING)
    segments[:, content] = 0
    attention = Attention(config.direction.value)
    with torch.no_grad():
        alone = model(batch_of(real, attention))
        hidden = model(batch_of(tokens, attention, segments_BS=segments))[:, content]
        blind = model(batch_of(tokens, attention))[:, content]
    assert (hidden - alone).abs().max() < 1e-4
    if side == "left" or config is TINY:  # the control: without the mask, padding shows
        assert (blind - alone).abs().max() > 1e-2


@pytest.mark.parametrize("form", [Convolution.auto, Convolution.fft, Convolution.chunked])
@pytest.mark.parametrize("size", [24, 700])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_documents_do_not_see_each_other(form: Convolution, size: int, reverse: bool) -> None:
    """Short rows are one chunk, long ones many; borders lie inside chunks and at their ends."""
    system, generator = system_of(), torch.Generator().manual_seed(0)
    u = torch.randn(2, size, 3, generator=generator, dtype=torch.float64)
    borders = [0, 7, 12, size] if size < 100 else [0, 5, 128, 256, 256 + 300, 690, size]
    segments = torch.zeros(2, size, dtype=torch.int32)
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        segments[:, start:end] = number if number % 3 else PADDING
    y = ssm.convolve(u, system.system(), form=form, segments_BS=segments, reverse=reverse)
    for start, end in itertools.pairwise(borders):
        part = ssm.convolve(u[:, start:end], system.system(), form=Convolution.fft, segments_BS=None, reverse=reverse)
        torch.testing.assert_close(y[:, start:end], part, rtol=1e-10, atol=1e-10)


# ---- recurrence (B13)


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


# ---- leaks (B5 to B9; every causal backbone: tests/test_contracts.py)


@pytest.mark.parametrize("name", FORMS)
def test_every_causal_form_shows_nothing_of_the_future(name: str) -> None:
    assert check_leaks(FORMS[name], steps=0).startswith("no leak")


def test_the_obvious_leak_test_is_blind_at_initial_weights() -> None:
    """The leak is a product of two small branches: with weights of 0.02 it drowns in the rounding of fp32, with 0.16 it is seen."""
    found = []
    for gain in (1.0, 8.0):
        model = enlarged(replace(TINY, final_norm=False), gain=gain)
        found.append(perturbation_influence(model, Attention.bidirectional).future)
    assert found[0] < 1e-6
    assert found[1] > 1e4 * found[0]


@pytest.mark.parametrize("name", FORMS)
def test_rounding_of_the_fourier_transform_is_small_in_single_precision(name: str) -> None:
    model = enlarged(FORMS[name], dtype=torch.float32)
    influence = perturbation_influence(model)
    one, other = draw_tokens(2, 24), draw_tokens(2, 24)
    other[:, 12] = (other[:, 12] + 1) % VOCAB
    assert influence.future < 1e-5 * float(changed_at(model, batch_of(one), batch_of(other))[12:].max())


# ---- precision (B14, B18)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "lightning"])
def test_casting_a_model_leaves_its_systems_exact(cast: str) -> None:
    model = TINY.build(vocab_size=VOCAB)
    kernel = model.blocks[0].forward_system.system().kernel(512)
    if cast == "lightning":
        from lightning.pytorch.plugins.precision import HalfPrecision

        model = HalfPrecision("bf16-true").convert_module(model)
    else:
        model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert model.blocks[0].value.weight.dtype != torch.float32
    assert torch.equal(model.blocks[0].forward_system.system().kernel(512), kernel)
    hidden = model(batch_of(draw_tokens(2, 20), Attention.bidirectional))
    assert hidden.dtype == model.blocks[0].value.weight.dtype
    assert hidden.isfinite().all()


def test_convolutions_stay_exact_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = ssm.convolve

    def watched(u_BSD: Tensor, system: Any, **how: Any) -> Tensor:
        seen.extend((u_BSD.dtype, system.rate.re.dtype, torch.is_autocast_enabled("cpu")))
        return plain(u_BSD, system, **how)

    monkeypatch.setattr(ssm, "convolve", watched)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = TINY.build(vocab_size=VOCAB)(batch_of(draw_tokens(2, 20), Attention.bidirectional))
    assert set(seen) == {torch.float32, torch.float64, False}
    assert hidden.dtype == torch.float32


def test_systems_that_arrive_coarse_are_refused() -> None:
    system = S4D(4)
    system.A_re.data = system.A_re.data.bfloat16()
    system.log_step.data = system.log_step.data.bfloat16()
    with pytest.raises(RunError, match=r"torch\.bfloat16, in which they are another system"):
        system.system()


@pytest.mark.distributed
def test_mixed_precision_of_sharded_runs_leaves_systems_exact_or_is_refused(tmp_path: Path) -> None:
    """One process is enough: parameters are cast where they are gathered."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    coarse = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        one, exact = batch_of(draw_tokens(2, 20), Attention.bidirectional), TINY.build(vocab_size=VOCAB)
        with torch.no_grad():
            want = exact(one)
        state, hidden = exact.state_dict(), []
        for keeps in (False, True):
            model = TINY.build(vocab_size=VOCAB)
            model.load_state_dict(state)
            for system in [m for m in model.modules() if isinstance(m, S4D)] if keeps else []:
                fully_shard(system, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
            fully_shard(model, mp_policy=coarse)
            if keeps:
                hidden.append(model(one))
            else:
                with pytest.raises(RunError, match="another system"):
                    model(one)
        assert (hidden[0].float() - want).norm() < 0.05 * want.norm()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_a_compiled_convolution_is_the_same_convolution(reverse: bool) -> None:
    """By itself: in a whole model at moderate weights it is a small part of the hidden states."""
    torch._dynamo.reset()
    system, results = system_of(8, dtype=torch.float32), []
    generator = torch.Generator().manual_seed(0)
    u, upstream = torch.randn(2, 32, 16, generator=generator), torch.randn(2, 32, 16, generator=generator)

    def run(given: Tensor) -> Tensor:
        return system(given, form=Convolution.auto, reverse=reverse)

    for function in (run, torch.compile(run, fullgraph=True)):
        given = u.clone().requires_grad_()
        y = function(given)
        results.append((y, *torch.autograd.grad(y, [given, *system.parameters()], upstream)))
    for plain, compiled in zip(*results, strict=True):
        assert (compiled - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", [TINY, CAUSAL], ids=["bidirectional", "causal"])
def test_compiles_whole_and_without_a_warning(config: BiGSBackboneConfig, packed: bool) -> None:
    torch._dynamo.reset()
    model, tokens = enlarged(config, dtype=torch.float32, gain=2.0), draw_tokens(2, 32)
    segments = (torch.arange(32) // 20).expand(2, 32).contiguous() if packed else None
    one = batch_of(tokens, Attention(config.direction.value), segments_BS=segments)
    upstream = torch.randn(16, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*complex")
        compiled = torch.compile(model, fullgraph=True)(one)
        (compiled * upstream).sum().backward()  # the plain sum of a normed vector has no gradient but rounding
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    plain = model(one)
    (plain * upstream).sum().backward()
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    for mine, other in zip(grads, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max().clamp(min=1e-6)))


# ---- what is refused, and by which words (B10, B20, B21)


def test_objectives_that_look_ahead_and_those_that_must_not() -> None:
    compose(["backbone=bigs", "objective=mlm", "head=mlm"])
    for objective in ("causal", "fim"):
        compose(["backbone=bigs", "backbone.direction=causal", f"objective={objective}"])
        with pytest.raises(ConfigError, match=f"objective={objective} needs causal .*use backbone.direction=causal, or objective=mlm"):
            compose(["backbone=bigs", f"objective={objective}"])
    with pytest.raises(ConfigError, match=r"use backbone\.direction=bidirectional"):
        compose(["backbone=bigs", "backbone.direction=causal", "objective=mlm"])


def test_values_on_what_reads_both_sides() -> None:
    """B21: a token may be scored when it was read; before that, a trunk that looks ahead has seen it."""
    value = ["objective=value", "head=value", "backbone=bigs"]
    config = compose([*value, "objective.bidirectional=true", "objective.alignment=after_token"])
    head = config.head.build(d_model=16, objective=config.objective)
    hidden = TINY.build(vocab_size=VOCAB)(batch_of(draw_tokens(2, 8), Attention.bidirectional))
    assert head.values(hidden).shape == (2, 8)
    with pytest.raises(ConfigError, match=r"alignment=state_before_action scores a token before it is read, and .*reads it"):
        compose([*value, "objective.bidirectional=true", "objective.alignment=state_before_action"])
    with pytest.raises(ConfigError, match=r"use backbone\.direction=causal"):
        compose([*value, "objective.alignment=state_before_action"])
    compose([*value, "backbone.direction=causal", "objective.alignment=state_before_action"])


def test_batches_of_the_wrong_attention_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.direction=bidirectional cannot read a batch whose attention is causal"):
        TINY.build(vocab_size=VOCAB)(batch_of(draw_tokens(1, 4)))
    with pytest.raises(ConfigError, match=r"backbone\.direction=bidirectional cannot generate"):
        TINY.build(vocab_size=VOCAB).new_cache(1, 4)


def test_lengths() -> None:
    model = CAUSAL.build(vocab_size=VOCAB)
    with pytest.raises(ConfigError, match=r"65 positions is longer than the 64 learned ones; set backbone.max_positions=65 or"):
        model(batch_of(draw_tokens(1, 65)))
    boundless = replace(CAUSAL, position=Position.none).build(vocab_size=VOCAB)
    assert boundless(batch_of(draw_tokens(1, 65))).shape == (1, 65, 16)
    with pytest.raises(ConfigError, match=r"backbone.max_positions=600 or backbone.position=none"):
        compose(["backbone=bigs", "objective=mlm", "data.sequence_length=600"])
    with pytest.raises(ConfigError, match=r"backbone.position=rotary is out of range; backbone=bigs allows learned, none"):
        compose(["backbone=bigs", "objective=mlm", "backbone.position=rotary"])


# ---- optimizer groups (B19)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_systems_have_their_own_rate_and_no_decay(optimizer: str, tiny: list[str]) -> None:
    from heads_lightning.experiment import build_model
    from heads_lightning.training.optimizers import build_optimizer

    mine = [x for x in tiny if not x.startswith("backbone.num_heads")]
    config = compose([*mine, "backbone=bigs", "objective=mlm", f"optimizer={optimizer}", "optimizer.learning_rate=0.01"])
    backbone, head = build_model(config, 512)
    made = build_optimizer(config.optimizer, backbone, head)
    groups = {id(p): group for group in made.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in made.param_groups)
    assert set(groups) == {id(p) for module in (backbone, head) for p in module.parameters()}
    for name, parameter in backbone.named_parameters():
        group = groups[id(parameter)]
        is_system = "_system." in name
        assert group["peak_lr"] == pytest.approx(0.001 if is_system else 0.01), name
        assert (group["weight_decay"] == 0) == (is_system or parameter.ndim == 1 or "blocks" not in name), name
        if optimizer == "muon":
            assert ("momentum" in group) == (parameter.ndim == 2 and "blocks" in name and not is_system), name


def test_bigs_is_a_backbone_like_others() -> None:
    model = TINY.build(vocab_size=VOCAB)
    assert isinstance(model, BiGS)
    assert set(BiGS.dynamics) == {name for name, _ in S4D(2).named_parameters()}
