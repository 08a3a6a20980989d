"""Does what the loss gains from oneDNN hold for a model's linear layers? Forward and backward in fp32, oneDNN's time over torch's.

    python experiments/benchmarks/linear.py layers    a layer with a bias, by size: the rule of onednn.LEAST_MULTIPLICATIONS
    python experiments/benchmarks/linear.py steps     whole training steps of the default transformer and of T5

Both in turn in one process, processor time of one thread, median of ratios within a round. Options: --rounds N, --json FILE.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from heads_lightning import onednn
from heads_lightning.batch import Attention, Batch
from heads_lightning.composition import compose
from heads_lightning.experiment import build_model
from heads_lightning.training.optimizers import build_optimizer

SHAPES = [
    (8, 128, 128), (32, 64, 64), (128, 64, 64), (64, 128, 128), (256, 64, 64), (64, 128, 512), (256, 128, 128), (512, 128, 128),
    (256, 256, 256), (256, 128, 512), (1024, 256, 256), (4, 1024, 4096), (16, 1024, 4096), (1024, 256, 1024), (1024, 1024, 256),
    (2048, 512, 2048), (1024, 768, 3072),
]  # fmt: skip
"""Rows, inputs, outputs."""
VOCABULARY = 8192


def seconds(work: Callable[[], Any], least: float = 0.01) -> float:
    """Processor time of one call, over at least `least` seconds of them."""
    calls, start = 0, time.thread_time()
    while (taken := time.thread_time() - start) < least:
        work()
        calls += 1
    return taken / calls


def layer(rows: int, inputs: int, outputs: int, rounds: int) -> dict[str, Any]:
    """oneDNN ÷ torch of one layer, with and without a backward pass."""
    x, weight = torch.randn(rows, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
    bias, upstream = torch.randn(outputs, requires_grad=True), torch.randn(rows, outputs)

    def train(linear: Callable[..., Tensor]) -> float:
        def call() -> None:
            x.grad = weight.grad = bias.grad = None
            linear(x, weight, bias).backward(upstream)

        return seconds(call)

    def read(linear: Callable[..., Tensor]) -> float:
        with torch.no_grad():
            return seconds(lambda: linear(x, weight, bias))

    row: dict[str, Any] = {
        "rows": rows,
        "inputs": inputs,
        "outputs": outputs,
        "multiplications_log2": (rows * inputs * outputs).bit_length() - 1,
    }
    for name, use in (("trained", train), ("read", read)):
        pairs = [(use(F.linear), use(onednn.linear)) for _ in range(rounds)]
        row |= {f"{name}_torch_us": round(1e6 * statistics.median(plain for plain, _ in pairs), 1)}
        row |= {f"{name}_onednn_over_torch": round(statistics.median(ours / plain for plain, ours in pairs), 3)}
    return row


def steps(rounds: int) -> Iterator[dict[str, Any]]:
    """A training step as `train` does it (forward, loss, backward, optimizer) of 4 sequences of the default length, in fp32."""
    models = {"transformer": ["objective=causal"], "t5": ["objective=span_corruption", "backbone=t5_tiny", "head=t5"]}
    sizes = [f"backbone.{size}" for size in ("d_model=256", "num_layers=4", "num_heads=4")]
    for name, overrides in models.items():
        config = compose([*overrides, *sizes, "optimizer=adamw"])
        batch = _batch(config.data.sequence_length, Attention.encoder_decoder if name == "t5" else Attention.causal)
        plain = build_model(config, VOCABULARY)
        ours = copy.deepcopy(plain)
        for part in ours:
            onednn.use_for_linear_layers(part)
        works = [_step(config, *parts, batch) for parts in (plain, ours)]
        pairs = [[seconds(work, 0.5) for work in works] for _ in range(rounds)]
        yield {
            "model": name, "torch_ms": round(1e3 * statistics.median(pair[0] for pair in pairs), 1),
            "onednn_over_torch": round(statistics.median(b / a for a, b in pairs), 3),
        }  # fmt: skip


def _batch(length: int, attention: Attention, rows: int = 4) -> Batch:
    """Random tokens; T5 writes a quarter of what it reads."""
    tokens = torch.randint(0, VOCABULARY, (rows, length))
    if attention != Attention.encoder_decoder:
        return Batch(tokens, tokens, attention, tokens.numel(), tokens.numel())
    target = tokens[:, : length // 4].contiguous()
    return Batch(target, target, attention, target.numel(), target.numel(), encoder_tokens_BT=tokens)


def _step(config: Any, backbone: Any, head: Any, batch: Batch) -> Callable[[], None]:
    optimizer = build_optimizer(config.optimizer, backbone, head)

    def step() -> None:
        head.loss(backbone(batch), batch, divisor=float(batch.num_targets)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def layers(rounds: int) -> Iterator[dict[str, Any]]:
    """Every shape."""
    with mock.patch.object(onednn, "LEAST_MULTIPLICATIONS", 0):
        for shape in SHAPES:
            yield layer(*shape, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "steps"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    for row in {"layers": layers, "steps": steps}[given.what](given.rounds):
        found.append(row)
        print(json.dumps(row), flush=True)
    if given.json is not None:
        given.json.write_text("\n".join(json.dumps(row) for row in found) + "\n", encoding="utf-8")
