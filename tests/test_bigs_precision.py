"""BiGS: its systems stay exact whatever the precision around them, and compiled (B14, B18)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bigs_reference import CAUSAL, TINY, VOCAB, system_of
from torch import Tensor

from heads_lightning.backbones import ssm
from heads_lightning.backbones.ssm import S4D, State
from heads_lightning.batch import Attention
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.layers import Convolution
from heads_lightning.registry import RunError
from heads_lightning.testing.backbones import batch_of, draw_tokens, enlarged

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("form", [Convolution.fft, Convolution.chunked])
def test_a_system_gives_the_same_bits_under_autocast(form: Convolution) -> None:
    """Its matrix products would else be in bf16; reading at once, several positions on, and one on."""
    system, found = system_of(8, dtype=torch.float32), []
    u = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))
    how = {"form": form, "segments_BS": None}
    for autocast in (False, True):
        state = State(2, 8, 4, like=u)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            pieces = [system(part, state=state, **how) for part in u.split([298, 1, 1], dim=1)]
            found.append((system(u, **how), state.values_BXD, *pieces))
    for plain, cast in zip(*found, strict=True):
        assert cast.dtype == torch.float32
        assert torch.equal(plain, cast)


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
            for system in model.exact_modules if keeps else []:
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
