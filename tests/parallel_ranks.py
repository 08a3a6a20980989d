"""Trains experiments one after the other on every rank of a torchrun job: `python parallel_ranks.py CASES.json`, {folder: overrides}."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from heads_lightning.composition import compose
from heads_lightning.run import train


class LaidOutRight(lightning.Callback):
    """What a checkpoint cannot show, for it is written by one rank.

    Before each update a gradient is laid out as its weight is: one that is still parts of a sum gives the same numbers, but is summed anew
    for the norm, the clipping and the update. After training, ranks that hold the same part of a weight hold the same numbers, to the bit.
    """

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: object) -> None:
        for name, parameter in pl_module.named_parameters():
            if isinstance(parameter, DTensor) and parameter.grad is not None:
                laid_out = parameter.grad.placements
                assert laid_out == parameter.placements, f"{name} is laid out as {parameter.placements}, its gradient as {laid_out}"

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if not isinstance(parameter, DTensor):
                continue
            for dim, placement in enumerate(parameter.placements):
                if placement.is_replicate():
                    own = parameter.to_local().detach()
                    most, least = own.clone(), own.clone()
                    dist.all_reduce(most, dist.ReduceOp.MAX, group=parameter.device_mesh.get_group(dim))
                    dist.all_reduce(least, dist.ReduceOp.MIN, group=parameter.device_mesh.get_group(dim))
                    assert torch.equal(most, least), f"copies of {name} differ by {float((most - least).max())}"


if __name__ == "__main__":
    for folder, overrides in json.loads(Path(sys.argv[1]).read_text()).items():
        train(compose(overrides), Path(folder), callbacks=[LaidOutRight()])
