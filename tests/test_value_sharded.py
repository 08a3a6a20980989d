"""Value heads on two processes (gloo): FSDP2, whole and sharded checkpoints, and the gradient of one process."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from value_data import inputs, tiny_model

from heads_lightning import AutoModelForCausalLMWithValueHead
from heads_lightning.batch import IGNORE, Attention, Batch
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.configs.value import ValueHeadConfig, ValueInit

pytestmark = pytest.mark.distributed
D = 32


def start(rank: int, port: int, work: Any, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        work(rank, Path(folder))
    finally:
        dist.destroy_process_group()


def on_two(work: Any, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(start, (port, work, str(folder)), nprocs=2, start_method="spawn")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wrapped() -> Any:
    torch.manual_seed(5)
    return AutoModelForCausalLMWithValueHead(tiny_model("llama"), v_head_init_strategy="normal", summary_dropout_prob=0.0).eval()


def sharded(model: Any, **how: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.pretrained_model.model.layers:
        fully_shard(layer, mesh=mesh, **how)
    fully_shard(model.v_head, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def value_wrapper(rank: int, folder: Path) -> None:
    """V5, V8, V9, V10 under FSDP2: values, gradients, whole and sharded states, types."""
    reference, ids = wrapped(), inputs("llama")["input_ids"]
    model = sharded(wrapped())
    for one in (reference, model):
        _, loss, values = one(ids, labels=ids)
        (loss + values.square().mean()).backward()
    # before the next forward pass, after which the weights of the root are whole, and other tensors
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None, name
            assert torch.allclose(whole(ours.grad), theirs.grad, atol=1e-6), name
    values = model(ids)[2]
    assert torch.allclose(values, reference(ids)[2], atol=1e-6)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        wrapped().load_state_dict(state, strict=True)
        assert all(torch.equal(state[k], v) for k, v in reference.state_dict().items())
        reference.save_pretrained(folder / "folder", state_dict=state)
    local = {k: v.clone() for k, v in get_model_state_dict(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    set_model_state_dict(model, local, options=StateDictOptions(strict=True))
    assert torch.equal(model(ids)[2], values)
    dist.barrier()
    assert torch.equal(AutoModelForCausalLMWithValueHead.from_pretrained(folder / "folder")(ids)[2], reference(ids)[2])
    low = sharded(wrapped(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert low(ids)[2].dtype == torch.float32
    assert (low(ids)[2] - values).abs().max() < 0.05 * values.abs().max() + 0.02


def ddp_wrapper(rank: int, folder: Path) -> None:
    """Gradients under DDP are the mean of the ranks' own."""
    ids = inputs("llama", rows=4)["input_ids"]
    reference = wrapped()
    reference(ids)[2].square().mean().backward()
    model = DistributedDataParallel(wrapped(), find_unused_parameters=True)  # the loss below uses no logits: untied lm_head has no gradient
    model(ids[2 * rank : 2 * rank + 2])[2].square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None, name
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-6), name


def parts() -> tuple[Any, Any]:
    backbone = TransformerConfig(d_model=D, num_layers=2, num_heads=2).build(vocab_size=61)
    backbone.reset_parameters(torch.Generator().manual_seed(0))
    head = ValueHeadConfig(init=ValueInit.normal, lm_weight=0.3, hidden_dim=16).build(d_model=D, vocab_size=61)
    head.reset_parameters(torch.Generator().manual_seed(1))
    return backbone, head


def rows(start: int, stop: int) -> Batch:
    """Rows of a step with unequal numbers of targets."""
    generator = torch.Generator().manual_seed(2)
    tokens, values = torch.randint(0, 61, (4, 12), generator=generator), torch.randn(4, 12, generator=generator)
    labels = torch.where(torch.arange(12) < torch.tensor([[2], [12], [5], [1]]), tokens.roll(-1, 1), IGNORE)
    count = int((labels[start:stop] != IGNORE).sum())
    return Batch(tokens[start:stop], labels[start:stop], Attention.causal, count, count, values_BS=values[start:stop])


def value_objective(rank: int, folder: Path) -> None:
    """O8 under FSDP2: two ranks with 14 and 6 targets have the gradient of one process with 20."""
    backbone, head = parts()
    step = rows(0, 4)
    head.loss(backbone(step), step, divisor=step.num_targets).loss.backward()
    sharded_backbone, sharded_head = parts()
    mesh = init_device_mesh("cpu", (2,))
    for module in (*sharded_backbone.blocks, sharded_backbone, sharded_head):
        fully_shard(module, mesh=mesh)
    mine = rows(2 * rank, 2 * rank + 2)
    assert mine.num_targets == (14, 6)[rank]
    found = sharded_head.loss(sharded_backbone(mine), mine, divisor=step.num_targets / 2)  # gradients are averaged over the ranks
    found.loss.backward()
    for ours, theirs in ((sharded_backbone, backbone), (sharded_head, head)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.allclose(whole(a.grad), b.grad, atol=1e-6), name
    apart = sharded_head.loss(sharded_backbone(mine), mine, divisor=None)
    total = apart.loss.sum()
    dist.all_reduce(total)
    assert total.item() == pytest.approx(head.loss(backbone(step), step, divisor=None).loss.sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    "work",
    [pytest.param(work, marks=pytest.mark.slow) for work in (value_wrapper, ddp_wrapper, value_objective)],  # training on two: test_value
    ids=lambda work: work.__name__,
)
def test_on_two_processes(work: Any, tmp_path: Path) -> None:
    on_two(work, tmp_path)
