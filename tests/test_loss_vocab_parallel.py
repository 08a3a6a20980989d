"""Vocabulary-parallel losses on 2 and 4 gloo processes against one process in fp64: value, metrics and gradients, to 1e-6 in fp32.

Shards are uneven (101 rows), and one is empty (9 rows over 4 ranks). Each group of processes is started once and runs every case.
"""

from __future__ import annotations

import itertools
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_cases import make_case, reference
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from heads_lightning import LMHeadConfig
from heads_lightning.losses import chunked, linear_cross_entropy
from heads_lightning.losses.vocab_parallel import vocab_shard

pytestmark = pytest.mark.distributed


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_on(world: int, check: Callable[[int, int], None]) -> None:
    """Run `check(rank, world)` in `world` processes; the first failure is shown."""
    queue: Any = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_worker, (world, free_port(), check, queue), nprocs=world, join=True)
    failures = []
    while not queue.empty():
        failures.append(queue.get())
    assert not failures, failures[0]


def _worker(rank: int, world: int, port: int, check: Callable[[int, int], None], queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        check(rank, world)
    except Exception:
        queue.put(f"rank {rank} of {world}: {traceback.format_exc()}")
    dist.destroy_process_group()


def assert_near(got: Tensor, want: Tensor, what: object, tolerance: float = 1e-6) -> None:
    error = (got.double() - want.double()).norm()
    assert bool(error <= tolerance * want.double().norm() + 1e-12), f"{what}: relative error {float(error / want.double().norm()):.1e}"


def pieces(total: int, world: int, rank: int) -> slice:
    size = -(-total // world)
    return slice(min(total, size * rank), min(total, size * (rank + 1)))


def check_every_feature(rank: int, world: int) -> None:
    chunked.WORKSPACE_BYTES = 1  # many chunks
    grid = itertools.product(
        ("default", "chunked"), ("mean", "sum", "none"), (0.0, 1e-2), (0.0, 0.1), (None, 3.0), (False, True), (False, True), (101, 9)
    )
    for implementation, reduction, z, smoothing, softcap, bias, weighted, v in grid:
        what = (implementation, reduction, z, smoothing, softcap, bias, weighted, v)
        case = make_case(bias=bias, weights=weighted, class_weights=weighted, v=v)
        upstream = torch.rand(len(case.labels), generator=torch.Generator().manual_seed(1)) if reduction == "none" else torch.tensor(0.75)
        want = reference(case, reduction=reduction, z=z, smoothing=smoothing, softcap=softcap, upstream=upstream)
        own = pieces(v, world, rank)
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight[own].clone().requires_grad_()
        bias_V = case.bias[own].clone().requires_grad_() if case.bias is not None else None
        loss = linear_cross_entropy(
            hidden,
            weight,
            case.labels,
            bias=bias_V,
            implementation=implementation,
            reduction=reduction,
            z_loss_multiplier=z,
            label_smoothing=smoothing,
            softcap=softcap,
            weights=case.weights,
            class_weights=case.class_weights,
            shard=vocab_shard(weight, dist.group.WORLD, vocab_size=v),
            token_metrics=True,
        )
        loss.total.backward(upstream)
        assert_near(loss.total, want.total, (what, "loss"))
        assert_near(loss.cross_entropy, want.cross_entropy, (what, "cross-entropy"))
        assert_near(loss.correct, want.correct, (what, "correct"))
        assert_near(loss.entropy, want.entropy, (what, "entropy"))
        assert_near(hidden.grad, want.grads["hidden"], (what, "dX"))
        assert_near(weight.grad, want.grads["weight"][own], (what, "dW"))
        if bias_V is not None:
            assert_near(bias_V.grad, want.grads["bias"][own], (what, "db"))


def check_heads_over_dtensors(rank: int, world: int) -> None:
    """Case A4 and more: every head with its projection sharded, masks uneven, positions kept, logits returned."""
    mesh = init_device_mesh("cpu", (world,))
    for name, implementation in itertools.product(("default", "normalized", "mlm"), ("default", "chunked", "auto", "torch")):
        torch.manual_seed(0)
        config = LMHeadConfig(name=name, loss_implementation=implementation, z_loss_multiplier=1e-2)
        whole = config.build(d_model=64, vocab_size=129)
        torch.manual_seed(0)
        shared = config.build(d_model=64, vocab_size=129)
        for module, key in ((shared.w_out, "weight"), (shared.w_out, "bias"), (shared, "sz")):
            parameter = getattr(module, key, None)
            if parameter is not None:
                setattr(module, key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        labels = torch.randint(0, 129, (2, 12))
        labels[0, :9] = -100
        for options in ({}, {"loss_reduction": "sum", "loss_div_factor": 15.0}, {"logits_to_keep": 4}, {"loss_reduction": "none"}):
            results = []
            for head in (whole, shared):
                head.zero_grad()
                x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
                out = head(x, labels=labels, return_logits=False, token_metrics=True, **options)
                out.loss.sum().backward()
                grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in head.parameters()]
                results.append([*out[1:], x.grad, *grads])
            for number, (want, got) in enumerate(zip(*results, strict=True)):
                assert_near(got, want, (name, implementation, options, number), 2e-6)
        x = torch.randn(2, 12, 64)
        dist.broadcast(x, 0)
        torch.testing.assert_close(shared(x).full_tensor(), whole(x))
        torch.testing.assert_close(shared(x, labels=labels, return_logits=True).logits.full_tensor(), whole(x))
        if name == "normalized":
            shared.after_optimizer_step()
            torch.testing.assert_close(shared.w_out.weight.full_tensor().norm(dim=1), torch.ones(129))


def check_collectives_and_refusals(rank: int, world: int) -> None:
    case = make_case(n=64, masked=0.0, v=100 * world)
    own = pieces(100 * world, world, rank)
    weight = case.weight[own].clone().requires_grad_()
    shard = vocab_shard(weight, dist.group.WORLD, vocab_size=100 * world)
    chunked.WORKSPACE_BYTES = 1  # chunks of 16 rows
    with CommDebugMode() as counted:
        loss = linear_cross_entropy(case.hidden.requires_grad_(), weight, case.labels, implementation="chunked", shard=shard).total
        loss.backward()
    counts = {str(k).split(".")[-1]: v for k, v in counted.get_comm_counts().items()}
    assert sum(counts.values()) == 4 + 1, counts  # an all-gather for each of 4 chunks, one all-reduce of dX
    with pytest.raises(ValueError, match=f"adds log {world}"):
        vocab_shard(case.weight, dist.group.WORLD, vocab_size=100 * world)
    mesh = init_device_mesh("cpu", (world,))
    sideways = distribute_tensor(case.weight.detach(), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="Shard"):
        linear_cross_entropy(case.hidden, sideways, case.labels, implementation="chunked")


def check_everything(rank: int, world: int) -> None:
    """In one set of processes: starting them costs more than the checks."""
    check_every_feature(rank, world)
    check_heads_over_dtensors(rank, world)
    check_collectives_and_refusals(rank, world)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_one_process(world: int) -> None:
    run_on(world, check_everything)
