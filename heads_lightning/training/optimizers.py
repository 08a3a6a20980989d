"""Optimizers from their configs, and the rule for parameter groups.

Weight decay acts on matrices of blocks and on an untied output projection; norms, biases, scales and embeddings are not decayed. Muon
takes the blocks' matrices; everything else goes to AdamW in the same optimizer object, so that Lightning, checkpoints and schedules
see one optimizer. Parameters of a recurrence (Backbone.dynamics) go to AdamW at a rate of their own, undecayed, whatever their shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from heads_lightning.backbones.base import Backbone
from heads_lightning.configs.optimizer import AdamWConfig, MuonConfig, OptimizerConfig
from heads_lightning.heads.base import Head
from heads_lightning.registry import ConfigError


def parameter_kinds(backbone: Backbone, head: Head) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter once: `matrices` (of the backbone), `projection` (of the head), `dynamics` (Backbone.dynamics), `rest`."""
    embedding = backbone.embedding.weight
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "projection": [], "dynamics": [], "rest": []}
    tables = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)} | {id(embedding)}
    seen: set[int] = set()
    for owner, module in (("matrices", backbone), ("projection", head)):
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_dynamics = module is backbone and name.rpartition(".")[2] in backbone.dynamics
            is_matrix = parameter.ndim >= 2 and id(parameter) not in tables
            kinds["dynamics" if is_dynamics else owner if is_matrix else "rest"].append(parameter)
    return kinds


def build_optimizer(config: OptimizerConfig, backbone: Backbone, head: Head) -> torch.optim.Optimizer:
    """The optimizer of a model. Each group holds `peak_lr`, which the schedule multiplies."""
    kinds = parameter_kinds(backbone, head)
    if not any(kinds.values()):
        raise ConfigError("nothing to train: every parameter is frozen")
    optimizer = config.build(kinds)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def _groups(config: OptimizerConfig, kinds: dict[str, list[nn.Parameter]], decayed: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """AdamW's groups: what is decayed, the rest, the parameters of a recurrence; none is empty."""
    made: list[dict[str, Any]] = [
        {"params": list(decayed), "weight_decay": config.weight_decay},
        {"params": kinds["rest"], "weight_decay": 0.0},
        {"params": kinds["dynamics"], "weight_decay": 0.0, "lr": config.learning_rate * config.dynamics_rate},
    ]
    return [group for group in made if group["params"]]


def _adamw(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def adamw(config: AdamWConfig, kinds: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW over all parameters."""
    return _adamw(config, _groups(config, kinds, kinds["matrices"] + kinds["projection"]))


def muon(config: MuonConfig, kinds: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    """Muon over the backbone's matrices, AdamW over the rest."""
    parts: list[torch.optim.Optimizer] = []
    flat = [p for p in kinds["matrices"] if p.ndim == 2]
    other = [p for p in kinds["matrices"] if p.ndim != 2] + kinds["projection"]
    if flat:
        parts.append(
            ShardableMuon(
                flat,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                # updates of AdamW's size, so that one learning rate serves both parts (arXiv 2502.16982, section 2.2)
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = _groups(config, kinds, other)
    if groups:
        parts.append(_adamw(config, groups))
    return CombinedOptimizer(parts)


class ShardableMuon(torch.optim.Muon):
    """PyTorch's Muon, also over sharded matrices: momentum is kept in shards, the update is gathered once and orthogonalised by PyTorch's
    own Muon on every rank, so that it is the update of one process. Its state is that of torch.optim.Muon."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step whole parameters as PyTorch does, or sharded ones."""
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_sharded(parameter, group)
        return None

    def _step_sharded(self, parameter: DTensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        held = state["momentum_buffer"]
        held.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(held, momentum) if group["nesterov"] else held
        change = _orthogonal_change(update.full_tensor(), group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None))


def _orthogonal_change(update: Tensor, group: dict[str, Any]) -> Tensor:
    """What Muon adds to a matrix for an update that holds the momentum already."""
    change = nn.Parameter(torch.zeros_like(update))
    change.grad = update
    options = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, nesterov=False, **options).step()
    return change.detach()


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters, stepped, saved and loaded as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {})
        # the very dicts of the parts: a change of `lr` here is a change there
        self.param_groups = groups

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step every part; the closure runs once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
