"""Schedules, optimizers and parameter groups by rule; blocks that are run again or compiled."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_parallel import curve
from test_training import largest_difference, weights

from heads_lightning.batch import Batch
from heads_lightning.composition import compose
from heads_lightning.configs.optimizer import optimizers
from heads_lightning.configs.schedule import schedules
from heads_lightning.experiment import build, load
from heads_lightning.registry import ConfigError
from heads_lightning.run import train
from heads_lightning.training.blocks import prepare_blocks
from heads_lightning.training.checkpoints import checkpoint_path, newest_checkpoint, read_checkpoint
from heads_lightning.training.optimizers import RMSScaledAdamW


def test_the_inverse_square_root_falls_from_the_end_of_the_warm_up_and_does_not_know_the_length() -> None:
    schedule = schedules["inverse_square_root"](warmup_steps=100)
    assert schedule.factor(100, 1000) == 1.0
    assert schedule.factor(400, 1000) == pytest.approx(0.5)
    assert schedule.factor(400, 1000) == schedule.factor(400, 10**6)


def test_linear_falls_to_its_final_fraction() -> None:
    schedule = schedules["linear"](warmup_steps=10, final_fraction=0.2)
    assert schedule.factor(10, 110) == 1.0
    assert schedule.factor(60, 110) == pytest.approx(0.6)
    assert schedule.factor(110, 110) == pytest.approx(0.2)


@pytest.mark.parametrize("name", list(schedules))
def test_a_warm_up_in_tokens_is_one_in_steps(name: str) -> None:
    tokens, steps = schedules[name](warmup_tokens=1000).in_steps(lambda positions: -(-positions // 100)), schedules[name](warmup_steps=10)
    assert [tokens.factor(step, 50) for step in range(50)] == [steps.factor(step, 50) for step in range(50)]
    assert steps.factor(9, 50) < 1.0 == steps.factor(10, 50)


def test_a_warm_up_said_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps=1 and schedule\.warmup_tokens=2 say the same thing twice; use"):
        schedules["linear"](warmup_steps=1, warmup_tokens=2)


def test_rms_scaled_adamw_is_adamw_at_the_rate_of_the_weights_own_size() -> None:
    """Against torch's AdamW, whose rate is set before each step to the root mean square of the weight."""
    start, least = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), 1e-3
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    scaled = RMSScaledAdamW([{"params": [ours]}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, least_rms=least)
    plain = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for i in range(5):
        gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(i + 1))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        plain.param_groups[0]["lr"] = 1e-2 * max(least, float(theirs.detach().square().mean().sqrt()))
        scaled.step()
        plain.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # fp32 rounding of another order of products
    assert float((ours - start).abs().max()) > 1e-2


def groups(tiny: list[str], *overrides: str) -> dict[str, dict]:
    """The optimizer group of each parameter of a tiny model, by name."""
    module = build(compose([*tiny, *overrides])).module
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: group for group in module.configure_optimizers().param_groups for p in group["params"]}


@pytest.mark.parametrize("optimizer", list(optimizers))
def test_named_parts_have_their_own_rate_and_decay(tiny: list[str], optimizer: str) -> None:
    rules = ["optimizer.rates=['backbone.*:0.5','*.query.*:0.25','head.*:0']", "optimizer.no_decay=['*.blocks.0.*']"]
    plain = groups(tiny, f"optimizer={optimizer}", "optimizer.weight_decay=0.1")
    ruled = groups(tiny, f"optimizer={optimizer}", "optimizer.weight_decay=0.1", *rules)
    assert ruled.keys() == plain.keys()
    for name, group in ruled.items():
        share = 0.0 if name.startswith("head.") else 0.25 if ".query." in name else 0.5
        assert group["peak_lr"] == pytest.approx(plain[name]["peak_lr"] * share)
        assert group["weight_decay"] == (0.0 if ".blocks.0." in name else plain[name]["weight_decay"])


def test_a_pattern_that_names_nothing_is_refused(tiny: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer\.rates: no parameter is named 'backbone\.embeding\.weight'.*backbone\.embedding\.weight"
    ):
        groups(tiny, "optimizer.rates=['backbone.embeding.weight:0.5']")


def test_a_rate_that_is_no_share_is_refused(tiny: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.rates.*PATTERN:SHARE"):
        compose([*tiny, "optimizer.rates=['head.*']"])


def saved_bytes(backbone: torch.nn.Module, batch: Batch) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters and repeats apart."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = backbone(batch)
    del hidden
    return sum(kept.values())


def test_blocks_that_are_run_again_keep_less_and_train_the_same_with_dropout(tiny: list[str], tmp_path: Path) -> None:
    kept = {}
    for every in (0, 2, 1):
        config = compose([*tiny, "backbone.dropout=0.1", f"trainer.recompute_every={every}"])
        train(config, tmp_path / str(every))
        experiment = build(config)
        experiment.module.train()
        kept[every] = saved_bytes(experiment.module.backbone, next(iter(experiment.datamodule.train_dataloader()))[0])
    assert largest_difference(weights(tmp_path / "0"), weights(tmp_path / "1")) == 0.0
    assert largest_difference(weights(tmp_path / "0"), weights(tmp_path / "2")) == 0.0
    assert kept[1] < 0.75 * kept[2] < 0.75 * 0.75 * kept[0]


def test_preparing_changes_no_name(tiny: list[str]) -> None:
    config = compose([*tiny, "trainer.recompute_every=1", "trainer.compile=true", "trainer.compile_blocks=true"])
    backbone = build(compose(tiny)).module.backbone
    before = list(backbone.state_dict())
    prepare_blocks(backbone, config.trainer)
    assert list(backbone.state_dict()) == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_train_the_same(tiny: list[str], tmp_path: Path) -> None:
    for name, fields in (("plain", []), ("compiled", ["trainer.compile=true", "trainer.compile_blocks=true", "trainer.recompute_every=2"])):
        train(compose([*tiny, "optimizer=adamw", "optimizer.eps=1.0", *fields]), tmp_path / name)
    difference = largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "compiled"))
    assert 0 <= difference < 1e-6
    assert math.isfinite(difference)


def test_the_average_is_that_of_the_weights_after_each_step_and_goes_on_after_a_break(tiny: list[str], tmp_path: Path) -> None:
    saving = ["trainer.checkpoint_every_steps=1", "trainer.keep_checkpoints=9", "optimizer.learning_rate=1e-1"]
    overrides = [*tiny, *saving, "optimizer.average_decay=0.5"]
    train(compose(overrides), tmp_path / "run")
    states = [read_checkpoint(checkpoint_path(tmp_path / "run", step)) for step in (1, 2, 3, 4)]
    for before, after in itertools.pairwise(states):
        expected = {name: 0.5 * value + 0.5 * after["state_dict"][name] for name, value in before["average"].items()}
        assert largest_difference(expected, after["average"]) < 1e-7
    assert largest_difference(dict(states[3]["average"]), {n: states[3]["state_dict"][n] for n in states[3]["average"]}) > 1e-3
    resumed = [*overrides, f"resume={checkpoint_path(tmp_path / 'run', 2)}", "trainer.checkpoint_format=distributed"]
    train(compose(resumed), tmp_path / "resumed")
    assert largest_difference(dict(states[3]["average"]), dict(read_checkpoint(newest_checkpoint(tmp_path / "resumed"))["average"])) == 0.0
    model = load(str(tmp_path / "run"))
    assert torch.equal(model.backbone.embedding.weight, states[3]["average"]["backbone.embedding.weight"])
    train(compose([*tiny, *saving]), tmp_path / "plain")
    assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "run")) == 0.0  # an average changes nothing of training
    assert curve(tmp_path / "plain", "val/loss") != curve(tmp_path / "run", "val/loss")
