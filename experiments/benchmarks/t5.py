"""A training step of T5, forward and backward, against transformers' T5ForConditionalGeneration with SDPA: time and peak memory.

    python experiments/benchmarks/t5.py [--rounds 9] [--masks] [--losses default chunked] [--layers 4] [--batch 4]

Same shapes (T5 v1.1: gated GELU, untied), same parameter count, fp32. Steps of all contestants alternate in one process; the figure is the
median of the ratios of neighbouring steps. Peak memory is the growth of the resident set over a model that is built and has seen a small
batch, each contestant in a process of its own. With --masks every row is padded a little; without, nothing is.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from heads_lightning.batch import IGNORE, PADDING, Attention, Batch
from heads_lightning.configs.t5 import T5Config, T5LMHeadConfig

D_MODEL, HEADS, FEED_FORWARD, VOCABULARY, SOURCE, TARGET = 256, 4, 704, 8192, 512, 114


def huggingface(arguments: argparse.Namespace) -> tuple[Callable[[int], None], int]:
    """A step on that many positions of the encoder, and the number of parameters."""
    import transformers

    of_every_model: dict[str, Any] = {"tie_word_embeddings": False, "decoder_start_token_id": 0, "attn_implementation": "sdpa"}
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=D_MODEL, d_kv=D_MODEL // HEADS, d_ff=FEED_FORWARD, num_layers=arguments.layers, num_heads=HEADS,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", **of_every_model,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # transformers ties it whatever the config says
    model.train()

    def step(source: int) -> None:
        encoder, keep, decoder, labels = batch(arguments, source)
        mask = keep if arguments.masks else None
        model.zero_grad()
        model(input_ids=encoder, attention_mask=mask, decoder_input_ids=decoder, labels=labels, use_cache=False).loss.backward()

    return step, sum(p.numel() for p in model.parameters())


def ours(arguments: argparse.Namespace, loss: str) -> tuple[Callable[[int], None], int]:
    """The same of backbone=t5 and head=t5."""
    config = T5Config(d_model=D_MODEL, num_layers=arguments.layers, num_heads=HEADS, feed_forward_dim=FEED_FORWARD)
    backbone = config.build(vocab_size=VOCABULARY).train()
    head = T5LMHeadConfig(loss_implementation=loss).build(d_model=D_MODEL, vocab_size=VOCABULARY).train()  # pyright: ignore

    def step(source: int) -> None:
        encoder, keep, decoder, labels = batch(arguments, source)
        backbone.zero_grad()
        head.zero_grad()
        masks: dict[str, Any] = {}
        if arguments.masks:
            masks = {"encoder_segments_BT": torch.where(keep == 1, 0, PADDING), "segments_BS": torch.where(labels != IGNORE, 0, PADDING)}
        targets = int((labels != IGNORE).sum())
        read = Batch(decoder, labels, Attention.encoder_decoder, targets, targets, encoder_tokens_BT=encoder, **masks)
        head(backbone(read), labels=labels, return_logits=False, num_targets=targets).loss.backward()

    return step, sum(p.numel() for module in (backbone, head) for p in module.parameters())


def batch(arguments: argparse.Namespace, source: int) -> tuple[torch.Tensor, ...]:
    """Encoder's ids and keep mask, decoder's ids, labels."""
    generator = torch.Generator().manual_seed(0)
    target = max(1, source * TARGET // SOURCE)
    encoder = torch.randint(2, VOCABULARY, (arguments.batch, source), generator=generator)
    labels = torch.randint(2, VOCABULARY, (arguments.batch, target), generator=generator)
    decoder = torch.cat((torch.zeros(arguments.batch, 1, dtype=torch.long), labels[:, :-1]), dim=1)
    keep = torch.ones_like(encoder)
    if arguments.masks:
        keep[:, -1] = 0
        labels[:, -1] = IGNORE
    return encoder, keep, decoder, labels


def contestants(arguments: argparse.Namespace) -> dict[str, Callable[[], tuple[Callable[[int], None], int]]]:
    named: dict[str, Callable[[], Any]] = {"transformers": lambda: huggingface(arguments)}
    for loss in arguments.losses:
        named[f"ours, {loss}"] = lambda loss=loss: ours(arguments, loss)
    return named


def peak(arguments: argparse.Namespace, name: str, queue: Any) -> None:
    """MiB that a step adds to the largest resident set."""
    step, _ = contestants(arguments)[name]()
    for _ in range(2):  # the libraries' own buffers
        step(16)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(SOURCE)
    queue.put(resident("VmHWM") - before)


def resident(key: str) -> float:
    """A line of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def timed(step: Callable[[int], None]) -> float:
    start = time.perf_counter()
    step(SOURCE)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--losses", nargs="*", default=["default", "chunked"])
    arguments = parser.parse_args()
    steps, sizes = {}, {}
    for name, make in contestants(arguments).items():
        steps[name], sizes[name] = make()
    assert len(set(sizes.values())) == 1, f"not the same model: {sizes}"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(SOURCE)
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times[name].append(timed(step))
    context, memory = multiprocessing.get_context("spawn"), {}
    for name in steps:
        queue = context.SimpleQueue()
        process = context.Process(target=peak, args=(arguments, name, queue))
        process.start()
        memory[name] = queue.get()
        process.join()
    print(f"{sizes['transformers'] / 1e6:.1f} M parameters, {arguments.batch} × ({SOURCE} + {TARGET}), {torch.get_num_threads()} thread(s)")
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["transformers"], strict=True))
        print(
            f"{name:18} {statistics.median(values):7.0f} ms   {statistics.median(ratios):.3f} of transformers "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})   peak +{memory[name]:.0f} MiB"
        )


if __name__ == "__main__":
    main()
