"""Optimizers from their configs, and the rule for parameter groups.

Weight decay acts on matrices of blocks and on an untied output projection; norms, biases, scales and embeddings are not decayed. Muon
takes the blocks' matrices; everything else goes to AdamW in the same optimizer object, so that Lightning, checkpoints and schedules
see one optimizer. Parameters of a recurrence (Backbone.dynamics) go to AdamW at a rate of their own, undecayed, whatever their shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from heads_lightning.backbones.base import Backbone
from heads_lightning.configs.optimizer import AdamWConfig, AdamWRMSConfig, MuonConfig, OptimizerConfig
from heads_lightning.heads.base import Head
from heads_lightning.registry import ConfigError, nearest


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
    _apply_rules(config, optimizer, backbone, head)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def _apply_rules(config: OptimizerConfig, optimizer: torch.optim.Optimizer, backbone: Backbone, head: Head) -> None:
    """Split groups by `config.rates` and `config.no_decay`; whatever the optimizer, its groups are dicts with a rate and a decay."""
    names: dict[int, list[str]] = {}  # a tied weight has two
    for prefix, module in (("backbone", backbone), ("head", head)):
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{name}")
    _check_patterns(config, [name for several in names.values() for name in several])
    for part in getattr(optimizer, "parts", [optimizer]):
        split = [new for group in part.param_groups for new in _split_group(group, config, names)]
        part.param_groups[:] = split
    if isinstance(optimizer, CombinedOptimizer):
        optimizer.collect_groups()


def _check_patterns(config: OptimizerConfig, names: list[str]) -> None:
    for field, patterns in (("rates", list(config.shares)), ("no_decay", config.no_decay)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"optimizer.{field}: no parameter is named {pattern!r}.{nearest(pattern, names)} E.g. backbone.embedding.*"
                )


def _split_group(group: dict[str, Any], config: OptimizerConfig, names: dict[int, list[str]]) -> list[dict[str, Any]]:
    made: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter in group["params"]:
        matching = [share for pattern, share in config.shares.items() if _matches(names[id(parameter)], pattern)]
        share = matching[-1] if matching else 1.0
        undecayed = any(_matches(names[id(parameter)], pattern) for pattern in config.no_decay)
        changes = {"lr": group["lr"] * share, "weight_decay": 0.0 if undecayed else group["weight_decay"]}
        made.setdefault((share, undecayed), {**group, **changes, "params": []})["params"].append(parameter)
    return list(made.values())


def _matches(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


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


def adamw_rms(config: AdamWRMSConfig, kinds: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW with updates of the weights' own size, over all parameters."""
    groups = _groups(config, kinds, kinds["matrices"] + kinds["projection"])
    return RMSScaledAdamW(
        groups, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), eps=config.eps, least_rms=config.least_rms
    )


class RMSScaledAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with each parameter's rate times max(least_rms, RMS(parameter)) (arXiv 1804.04235, section 8)."""

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, least_rms: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "least_rms": least_rms, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        steps = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        size = parameter.square().mean().sqrt().clamp(min=group["least_rms"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(state["exp_avg"] / root * size * (group["lr"] / (1 - beta1**steps)))


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
        assert isinstance(update, DTensor)
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
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.collect_groups()

    def collect_groups(self) -> None:
        """Show the very dicts of the parts: a change of `lr` here is a change there."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

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
        self.collect_groups()
