"""BiGS: convolutions by length, a training step against the complex formulation, decoding speed by context length.

    python experiments/benchmarks/bigs.py convolution     the rule of backbone.convolution=auto
    python experiments/benchmarks/bigs.py step            ours / complex formulation with torch's linear layers, at 512 and 2048 positions
    python experiments/benchmarks/bigs.py decode          tokens per second after 256 … 4096 positions, and the transformer's

Variants alternate in one process; a ratio is the median over neighbouring rounds. Options: --threads N, --rounds N, --json FILE.
The complex formulation is the published one: one complex exponential for each mode and position, and Fourier transforms of twice the
length of tensors with time last, all under autograd; gates by torch's GELU.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from heads_lightning import onednn
from heads_lightning.backbones import gelu, ssm
from heads_lightning.batch import Attention
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.head import DefaultLMHeadConfig, LMLossImplementation
from heads_lightning.configs.layers import Convolution, Direction, Position
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.generation import reading_mode
from heads_lightning.testing.backbones import batch_of

LENGTHS = (128, 256, 512, 1024, 2048, 4096)


def milliseconds(work: Callable[[], Any], least: float = 0.2) -> float:
    """Processor time of one call, of all threads: the median over at least `least` seconds of them."""
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def complex_forward(self: ssm.S4D, u_BSD: Tensor, *, form: Convolution, segments_BS: Tensor | None = None, reverse: bool = False) -> Tensor:
    """S4D.forward as published: complex kernel, flips, Fourier transforms over the last dimension."""
    with torch.autocast("cpu", enabled=False):
        u_BDS = (u_BSD.flip(1) if reverse else u_BSD).float().transpose(1, 2)
        size = u_BDS.shape[-1]
        A = self.A_re.clamp(max=-1e-4) + 1j * self.A_im
        rate = A * self.log_step.exp()
        gain = torch.view_as_complex(self.C) * (torch.exp(rate) - 1.0) / A
        kernel = torch.einsum("n,nl->l", gain, torch.exp(rate[:, None] * torch.arange(size))).real
        y_f = torch.fft.rfft(u_BDS, n=2 * size) * torch.fft.rfft(kernel, n=2 * size)
        y_BDS = torch.fft.irfft(y_f, n=2 * size)[..., :size] + u_BDS * self.D
        y_BSD = y_BDS.transpose(1, 2)
        return (y_BSD.flip(1) if reverse else y_BSD).to(u_BSD.dtype)


@contextmanager
def complex_formulation() -> Iterator[None]:
    """Inside, every state-space model is computed as published, and every gate by torch's GELU."""
    with mock.patch.object(ssm.S4D, "forward", complex_forward), mock.patch.object(gelu, "is_plain", return_value=False):
        yield


@contextmanager
def no_systems() -> Iterator[None]:
    """Inside, state-space models cost nothing: the floor of any formulation."""
    with mock.patch.object(ssm.S4D, "forward", lambda self, u_BSD, **how: u_BSD * self.D):
        yield


def convolution(rounds: int) -> Iterator[dict[str, Any]]:
    """Forward and backward of one state-space model, batch 4, width 256, 64 modes."""
    for length in LENGTHS:
        system = ssm.S4D(64)
        system.reset_parameters(torch.Generator().manual_seed(0))
        u = torch.randn(4, length, 256, requires_grad=True)
        packed = (torch.arange(length) // 100).expand(4, length)

        def run(form: Convolution, segments: Tensor | None, system: ssm.S4D = system, u: Tensor = u) -> None:
            system(u, form=form, segments_BS=segments).sum().backward()

        ways = {"fft": (Convolution.fft, None), "chunked": (Convolution.chunked, None), "packed": (Convolution.auto, packed)}
        times: dict[str, list[float]] = {name: [] for name in (*ways, "complex")}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(milliseconds(lambda way=way: run(*way)))
            with complex_formulation():
                times["complex"].append(milliseconds(lambda: run(Convolution.fft, None)))
        yield {"length": length} | {f"{name}_ms": round(statistics.median(found), 2) for name, found in times.items()}


def step(rounds: int, width: int, layers: int, bf16: bool) -> Iterator[dict[str, Any]]:
    """A training step of a masked language model: forward, loss, backward, optimizer.

    `ours` has what a run in fp32 gets on a processor where oneDNN is faster: linear layers by it, and the loss by `auto`.
    `ours_torch_linear` and `complex`, the reference, have torch's linear layers and torch's loss.
    """
    for length, rows in ((512, 4), (2048, 1)):
        config = BiGSBackboneConfig(d_model=width, num_layers=layers, max_positions=length)
        auto = DefaultLMHeadConfig(loss_implementation=LMLossImplementation.auto)
        plain = torch.nn.ModuleList((config.build(vocab_size=4096), DefaultLMHeadConfig().build(d_model=width, vocab_size=4096)))
        offered = torch.nn.ModuleList((copy.deepcopy(plain[0]), auto.build(d_model=width, vocab_size=4096)))
        onednn.use_for_linear_layers(offered)
        tokens = torch.randint(0, 4096, (rows, length))
        labels = torch.where(torch.rand(rows, length) < 0.15, tokens, -100)
        run, run_offered = (_step_of(parts, tokens, labels, bf16) for parts in (plain, offered))
        times: dict[str, list[float]] = {"ours": [], "ours_torch_linear": [], "complex": [], "without_systems": []}
        for _ in range(rounds):
            times["ours"].append(milliseconds(run_offered))
            times["ours_torch_linear"].append(milliseconds(run))
            with complex_formulation():
                times["complex"].append(milliseconds(run))
            with no_systems():
                times["without_systems"].append(milliseconds(run))
        columns = list(zip(*times.values(), strict=True))
        yield {
            "length": length, "rows": rows, "width": width, "layers": layers, "bf16": bf16,
            **{f"{name}_ms": round(statistics.median(found), 1) for name, found in times.items()},
            "ours_over_complex": _median(ours / theirs for ours, _, theirs, _ in columns),
            "ours_torch_linear_over_complex": _median(ours / theirs for _, ours, theirs, _ in columns),
            "ours_over_complex_systems_alone": _median((ours - least) / (theirs - least) for _, ours, theirs, least in columns),
        }  # fmt: skip


def _median(ratios: Iterable[float]) -> float:
    return round(statistics.median(ratios), 3)


def _step_of(parts: torch.nn.ModuleList, tokens: Tensor, labels: Tensor, bf16: bool) -> Callable[[], None]:
    """A training step of (backbone, head), done once already."""
    optimizer = torch.optim.AdamW(parts.parameters(), fused=True)
    backbone, head = parts

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = head(backbone(batch_of(tokens, Attention.bidirectional)), labels=labels, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def decode(rounds: int, width: int, layers: int) -> Iterator[dict[str, Any]]:
    """Milliseconds for one new token after a context, one sequence; BiGS and a transformer of as many parameters alternate."""
    models = {
        "bigs": BiGSBackboneConfig(
            d_model=width, num_layers=layers, inner_dim=8 * width // 3 // 64 * 64 + 64, direction=Direction.causal, position=Position.none
        ).build(vocab_size=4096),
        "transformer": TransformerConfig(d_model=width, num_layers=layers).build(vocab_size=4096),
    }
    contexts, new = (256, 512, 1024, 2048, 4096), 32
    times = {(name, context): [] for name in models for context in contexts}
    with reading_mode(*models.values()):
        for _ in range(rounds):
            for context in contexts:
                for name, model in models.items():
                    cache = model.new_cache(1, context + new)
                    model(batch_of(torch.randint(0, 4096, (1, context))), cache)
                    token = torch.randint(0, 4096, (1, 1))
                    start = time.perf_counter()
                    for _ in range(new):
                        model(batch_of(token), cache)
                    times[name, context].append(1e3 * (time.perf_counter() - start) / new)
    for context in contexts:
        pair = times["bigs", context], times["transformer", context]
        ratio = statistics.median(a / b for a, b in zip(*pair, strict=True))
        flat = statistics.median(a / b for a, b in zip(times["bigs", context], times["bigs", 256], strict=True))
        yield {
            "context": context, "bigs_ms": round(statistics.median(pair[0]), 3), "transformer_ms": round(statistics.median(pair[1]), 3),
            "bigs_over_transformer": round(ratio, 3), "bigs_over_itself_at_256": round(flat, 3),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("convolution", "step", "decode"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    made = {
        "convolution": lambda: convolution(given.rounds),
        "step": lambda: step(given.rounds, given.width, given.layers, given.bf16),
        "decode": lambda: decode(given.rounds, given.width, given.layers),
    }[given.what]()
    rows = []
    for row in made:
        rows.append(row)
        print(json.dumps(row), flush=True)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
