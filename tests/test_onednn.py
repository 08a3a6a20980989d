"""Linear layers by oneDNN: the numbers of torch's, at every call that it is for and at none that it is not; and who chooses it."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from torch import Tensor, nn

from heads_lightning import onednn
from heads_lightning.composition import compose
from heads_lightning.composition.resume import resumed_config
from heads_lightning.configs.trainer import LinearKernel, TrainerConfig
from heads_lightning.experiment import build
from heads_lightning.registry import ConfigError
from heads_lightning.run import train
from heads_lightning.tracking.run_folder import read_metrics
from heads_lightning.training.agreement import settled

pytestmark = pytest.mark.skipif(not onednn.is_right(), reason="PyTorch has no such product here")
DIGITS = 2e-6
"""Two orders of summation of up to 200 products in fp32, relative to the norm."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """The operands of oneDNN's products, which take calls of any size; each operand lies densely in memory."""
    operands, plain = [], onednn.product

    def watched(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        operands.append((a_MK, b_NK))
        for operand in (a_MK, b_NK):
            assert operand.is_contiguous() or operand.mT.is_contiguous()
        return plain(a_MK, b_NK, bias_N)

    monkeypatch.setattr(onednn, "product", watched)
    monkeypatch.setattr(onednn, "LEAST_MULTIPLICATIONS", 0)
    return operands


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = {
    "vector": lambda: drawn(48),
    "matrix": lambda: drawn(5, 48),
    "batch": lambda: drawn(3, 5, 48),
    "four dimensions": lambda: drawn(2, 3, 5, 48),
    "one row": lambda: drawn(1, 1, 48),
    "transposed": lambda: drawn(48, 5).t(),
    "batch of transposed": lambda: drawn(3, 48, 5).transpose(1, 2),
    "part of a wider matrix": lambda: drawn(3, 5, 200)[..., 7:55],
    "every second row": lambda: drawn(3, 10, 48)[:, ::2],
    "many rows": lambda: drawn(2048, 48),
    "one row for all": lambda: drawn(48).expand(3, 5, 48),
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_values_and_gradients_are_those_of_torch(asked: list[Any], kind: str, biased: bool) -> None:
    layer = nn.Linear(48, 200, bias=biased)
    exact = copy.deepcopy(layer).double()
    onednn.use_for_linear_layers(layer)
    found = []
    for module, x in ((layer, INPUTS[kind]()), (exact, INPUTS[kind]().double())):
        x.requires_grad_()
        y = module(x)
        # the gradient of a transposed result is a strided one
        found.append(
            (
                y,
                *torch.autograd.grad(
                    y.mT if y.ndim > 1 else y, [x, *module.parameters()], drawn(*y.mT.shape if y.ndim > 1 else y.shape).to(y)
                ),
            )
        )
    for ours, want in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == want.shape
        assert (ours - want).norm() <= DIGITS * want.norm()
    assert len(asked) == 3


@pytest.mark.parametrize(("learns", "products"), [((True, False), 2), ((False, True), 2), ((False, False), 1)])
def test_what_does_not_learn_costs_and_keeps_nothing(asked: list[Any], learns: tuple[bool, bool], products: int) -> None:
    layer, x = nn.Linear(48, 200), drawn(5, 48).requires_grad_(learns[0])
    layer.weight.requires_grad_(learns[1])
    onednn.use_for_linear_layers(layer)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    y.sum().backward()
    assert len(asked) == products
    assert sorted(t.shape for t in kept) == sorted(s for s, l in ((layer.weight.shape, learns[0]), (x.shape, learns[1])) if l)
    assert layer.bias.grad is not None
    assert (layer.weight.grad is not None, x.grad is not None) == (learns[1], learns[0])


def test_calls_that_are_not_for_it_are_those_of_torch(asked: list[Any]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = nn.Linear(48, 200)
    onednn.use_for_linear_layers(layer)
    for kind in (torch.float64, torch.bfloat16):
        other = copy.deepcopy(layer).to(kind)
        assert torch.equal(other(drawn(5, 48).to(kind)), F.linear(drawn(5, 48).to(kind), other.weight, other.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(drawn(5, 48)).dtype == torch.bfloat16
    assert copy.deepcopy(layer).to("meta")(drawn(5, 48).to("meta")).shape == (5, 200)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(5, 48)).shape == (5, 200)
    empty = drawn(0, 5, 48).requires_grad_()
    layer(empty).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
    part = drawn(200, 64)[:, :48]
    torch.testing.assert_close(onednn.linear(drawn(5, 48), part), drawn(5, 48) @ part.t())
    for wrong, words in ((drawn(5, 47), "cannot be multiplied"), (drawn(5, 48).double(), "same dtype")):
        with pytest.raises(RuntimeError, match=words):
            layer(wrong)
    assert asked == []


def test_small_layers_are_those_of_torch() -> None:
    layer, x = nn.Linear(64, 64), drawn(8, 64)
    want = layer(x)
    onednn.use_for_linear_layers(layer)
    assert torch.equal(layer(x), want)


def test_a_second_derivative_is_that_of_torch(asked: list[Any]) -> None:
    found = []
    for linear in (F.linear, onednn.linear):
        x, weight, bias = drawn(5, 48).requires_grad_(), drawn(9, 48, seed=1).requires_grad_(), drawn(9, seed=2).requires_grad_()
        (first,) = torch.autograd.grad(linear(x, weight, bias).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, weight, bias]))
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 10 * DIGITS * theirs.norm()
    assert asked


def test_a_layer_stays_what_it_is(asked: list[Any]) -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    model = nn.Sequential(nn.Linear(48, 48), Own(48, 48))
    names, want, fired = list(model.state_dict()), model(drawn(5, 48)), []
    onednn.use_for_linear_layers(model)
    onednn.use_for_linear_layers(model)
    model[0].register_forward_hook(lambda *_: fired.append(True))
    assert (type(model[0]), list(model.state_dict())) == (nn.Linear, names)
    torch.testing.assert_close(model(drawn(5, 48)), want)
    assert (len(asked), len(fired)) == (1, 1)


@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_a_copy_multiplies_by_its_own_weights(asked: list[Any], way: str) -> None:
    model = nn.Sequential(nn.Linear(48, 48))
    onednn.use_for_linear_layers(model)
    if way == "copied":
        made = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        made = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with torch.no_grad():
        made[0].weight.zero_()
        assert torch.equal(made(drawn(5, 48)), made[0].bias.expand(5, 48))
        assert not torch.equal(model(drawn(5, 48)), made(drawn(5, 48)))
    assert len(asked) == 3


@pytest.mark.slow
def test_a_compiled_layer_is_torch_s(asked: list[Any]) -> None:
    layer = nn.Linear(48, 200)
    onednn.use_for_linear_layers(layer)
    compiled = torch.compile(layer, fullgraph=True)(drawn(5, 48))
    assert asked == []
    torch.testing.assert_close(compiled, layer(drawn(5, 48)))


@pytest.mark.distributed
def test_sharded_layers_have_the_same_gradients(asked: list[Any], tmp_path: Path) -> None:
    """One process is enough: weights are gathered before a block and freed after it all the same. Weights shared out by tensor parallelism
    are torch's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        plain = nn.Sequential(nn.Linear(48, 200), nn.GELU(), nn.Linear(200, 48))
        sharded, split = copy.deepcopy(plain), copy.deepcopy(plain[0])
        onednn.use_for_linear_layers(nn.ModuleList([sharded, split]))
        for layer in (sharded[0], sharded[2], sharded):
            fully_shard(layer, reshard_after_forward=True)
        for model in (plain, sharded):
            model(drawn(5, 48)).square().sum().backward()
        assert len(asked) == 5  # the first layer's input learns nothing
        for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
        parallelize_module(split, init_device_mesh("cpu", (1,)), ColwiseParallel())
        torch.testing.assert_close(split(drawn(5, 48)), plain[0](drawn(5, 48)))
        assert len(asked) == 5
    finally:
        torch.distributed.destroy_process_group()


# ---- in a run


MODELS = {
    "transformer": ["objective=causal"],
    "recomputed": ["objective=causal", "trainer.recompute_every=1", "backbone.dropout=0.1"],
    "t5": ["objective=span_corruption", "backbone=t5_tiny", "head=t5", "tokenizer.num_sentinels=20"],
    "bigs": ["objective=mlm", "head=mlm", "backbone=bigs_tiny"],
}


def of(model: str, tiny: list[str], kernel: str) -> list[str]:
    own_sizes = model in ("t5", "bigs")
    kept = [o for o in tiny if not (own_sizes and o.startswith("backbone."))]
    return [*kept, *MODELS[model], f"trainer.linear_kernel={kernel}", "optimizer=adamw"]


@pytest.mark.parametrize("model", MODELS)
def test_a_run_has_the_losses_of_torch(asked: list[Any], tiny: list[str], tmp_path: Path, model: str) -> None:
    losses = {}
    for kernel in ("torch", "onednn"):
        train(compose(of(model, tiny, kernel)), tmp_path / kernel)
        losses[kernel] = [p.values[n] for p in read_metrics(tmp_path / kernel) for n in ("train/loss", "val/loss") if n in p.values]
        assert bool(asked) == (kernel == "onednn")
    assert losses["onednn"] == pytest.approx(losses["torch"], rel=1e-5)


def test_every_linear_layer_of_a_run_takes_part(tiny: list[str]) -> None:
    for model in MODELS:
        module = build(compose(of(model, tiny, "onednn"))).module
        layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
        assert len(layers) > 4
        assert all("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("faster", [True, False])
def test_auto_is_settled_once_said_and_kept(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: faster)
    kernel, said = LinearKernel.onednn if faster else LinearKernel.torch, io.StringIO()
    train(compose([*tiny, "trainer.max_steps=1"]), tmp_path, console=Console(file=said))
    assert ("linear layers by oneDNN" in " ".join(said.getvalue().split())) == faster
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["linear_kernel"] == kernel
    # a resumed run takes the answer, whatever would be measured now; one that goes on in another way asks again
    monkeypatch.setattr(onednn, "is_faster", lambda: not faster)
    assert settled(resumed_config(tmp_path, "it", ["trainer.max_steps=2"]).trainer).linear_kernel == kernel
    elsewhere = resumed_config(tmp_path, "it", ["trainer.parallel=tensor", "trainer.devices=2"])
    assert settled(elsewhere.trainer).linear_kernel == LinearKernel.torch


def test_ranks_take_what_the_first_one_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = TrainerConfig(max_steps=1, precision="32-true", accelerator="cpu")
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    assert settled(trainer).linear_kernel == LinearKernel.onednn
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert settled(trainer).linear_kernel == LinearKernel.onednn
    assert settled(replace(trainer, compile=True)).linear_kernel == LinearKernel.torch  # the measurement is handed down, not the choice
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert settled(trainer).linear_kernel == LinearKernel.torch


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "bf16-mixed"},
        {"accelerator": "gpu"},
        {"compile": True},
        {"parallel": "tensor", "devices": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_elsewhere_auto_is_torch_s_and_onednn_is_refused(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    given = {"max_steps": 1, "precision": "32-true", "accelerator": "cpu"} | fields
    assert settled(TrainerConfig(**given)).linear_kernel == LinearKernel.torch
    field, value = next(iter(fields.items()))
    with pytest.raises(
        ConfigError, match=f"linear_kernel=onednn has no part in trainer.{field}={value}; use trainer.linear_kernel=torch, or"
    ):
        TrainerConfig(**given, linear_kernel=LinearKernel.onednn)


def test_a_machine_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_right", lambda: False)
    trainer = TrainerConfig(max_steps=1, precision="32-true", accelerator="cpu")
    assert settled(trainer).linear_kernel == LinearKernel.torch
    with pytest.raises(ConfigError, match=r"no product of oneDNN that is right; use trainer\.linear_kernel=torch"):
        settled(TrainerConfig(max_steps=1, precision="32-true", accelerator="cpu", linear_kernel=LinearKernel.onednn))
