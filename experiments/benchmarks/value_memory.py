"""Memory of a language model with a value head: the wrapper, against collecting all hidden states as TRL's class did.

    python experiments/benchmarks/value_memory.py [--layers 12]

Counted storage by storage (what is alive at once inside one call, parameters and their gradients of the call included), so the numbers are
exact and the same on every machine. Both sides run the same model in the same process. "All hidden states" is what TRL 0.11 to 1.12 does:
output_hidden_states=True, the cache that generation uses left on, logits and values from what comes back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heads_lightning import AutoModelForCausalLMWithValueHead


class Peak(TorchDispatchMode):
    """Bytes of all storages made inside and alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


def collecting(model: Any, ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """TRL's way."""
    output = model.pretrained_model(ids, output_hidden_states=True, return_dict=True)
    values = model.v_head.summary(output.hidden_states[-1].float()).squeeze(-1)
    return output.logits.float(), values


def wrapper(model: Any, ids: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Ours."""
    logits, _, values = model(ids, **given)
    return logits, values


def forward_backward(forward: Callable[..., tuple[Tensor, Tensor]], model: Any, ids: Tensor, **given: Any) -> None:
    """A critic's step: both outputs are held, as a caller holds them, and the values are trained."""
    outputs = forward(model, ids, **given)
    outputs[1].square().mean().backward()
    del outputs


def reading(forward: Callable[..., tuple[Tensor, Tensor]], model: Any, ids: Tensor, **given: Any) -> None:
    """Values of a batch, without a gradient: what is done to every rollout."""
    with torch.no_grad():
        forward(model, ids, **given)


def build(options: argparse.Namespace, *, frozen: bool, checkpointing: bool, architecture: str) -> Any:
    torch.manual_seed(0)
    layers, width = options.layers, options.width
    common = {"vocab_size": options.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 11 * width // 4,
        "num_key_value_heads": 4,
    }
    gpt2 = {"n_embd": width, "n_layer": layers, "n_head": 4, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    described = transformers.GPT2Config(**gpt2, **common) if architecture == "gpt2" else transformers.LlamaConfig(**shape, **common)
    model = AutoModelForCausalLMWithValueHead(transformers.AutoModelForCausalLM.from_config(described), summary_dropout_prob=0.0)
    model.train()
    model.pretrained_model.requires_grad_(not frozen)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


CASES: dict[str, dict[str, Any]] = {
    "forward and backward": {"run": forward_backward},
    "forward and backward, values alone (logits_to_keep=1)": {"run": forward_backward, "given": {"logits_to_keep": 1}},
    "forward and backward, gradient checkpointing": {"run": forward_backward, "checkpointing": True},
    "forward and backward, frozen trunk": {"run": forward_backward, "frozen": True},
    "forward without gradient": {"run": reading},
    "forward without gradient, values alone (logits_to_keep=1)": {"run": reading, "given": {"logits_to_keep": 1}},
}


def measure(case: dict[str, Any], options: argparse.Namespace, architecture: str) -> dict[str, float]:
    found = {}
    for way, forward in (("collecting", collecting), ("wrapper", wrapper)):
        changes = {name: case.get(name, False) for name in ("frozen", "checkpointing")}
        model = build(options, **changes, architecture=architecture)
        ids = torch.randint(0, options.vocabulary, (options.rows, options.length))
        with Peak() as peak:
            case["run"](forward, model, ids, **(case.get("given", {}) if way == "wrapper" else {}))
        found[way] = peak.bytes / 2**20
    return found | {"ratio": found["wrapper"] / found["collecting"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--vocabulary", type=int, default=8192, help="32 times the width; GPT-2 has 65, Llama 2 7B has 8, Qwen3 0.6B has 148"
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {f"{kind}: {name}": measure(case, options, kind) for kind in ("gpt2", "llama") for name, case in CASES.items()}
    if options.json:
        print(json.dumps(results, indent=1))
        return
    shape = f"{options.layers} layers, width {options.width}, vocabulary {options.vocabulary:,}, {options.rows} x {options.length} tokens"
    print(f"{shape}, fp32; MiB at the peak")
    for name, found in results.items():
        print(f"  {name:72s} {found['collecting']:8.1f} -> {found['wrapper']:8.1f}   x {found['ratio']:.2f}")


if __name__ == "__main__":
    main()
