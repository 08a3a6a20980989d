"""Memory of a language model with a value head: the wrapper, against collecting all hidden states as TRL's class did.

    python experiments/benchmarks/value_memory.py [--layers 12] [--width 256] [--vocabulary 8192] [--dtype bfloat16]

Counted storage by storage (what is alive at once inside one call, parameters and their gradients of the call included), so the numbers are
exact and the same on every machine. Both sides run the same model in the same process. "All hidden states" is what TRL 0.11 to 1.12 does:
output_hidden_states=True, the cache that generation uses left on, logits and values from what comes back, the model's own loss of labels.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from heads_lightning import AutoModelForCausalLMWithValueHead
from heads_lightning.testing.memory import PeakMemory

Outputs = tuple[Tensor | None, Tensor | None, Tensor]


def collecting(model: Any, ids: Tensor, *, labels: Tensor | None = None, **_: Any) -> Outputs:
    """TRL's way."""
    output = bare(model)(ids, labels=labels, output_hidden_states=True, return_dict=True)
    values = model.v_head.summary(output.hidden_states[-1].float()).squeeze(-1)
    return output.logits.float(), output.loss, values


def bare(model: Any) -> Any:
    """The wrapped model with the loss that it had before it was wrapped."""
    model.pretrained_model.loss_function = model._vocabulary.own_loss
    return model.pretrained_model


def wrapper(model: Any, ids: Tensor, **given: Any) -> Outputs:
    """Ours."""
    return model(ids, **given)


def critic(forward: Callable[..., Outputs], model: Any, ids: Tensor, **given: Any) -> None:
    """A critic's step: the outputs are held, as a caller holds them, and the values are trained."""
    outputs = forward(model, ids, **given)
    outputs[2].square().mean().backward()
    del outputs


def actor_critic(forward: Callable[..., Outputs], model: Any, ids: Tensor, **given: Any) -> None:
    """Values and the loss of labels are trained together."""
    outputs = forward(model, ids, labels=ids, **given)
    assert outputs[1] is not None
    (outputs[2].square().mean() + outputs[1]).backward()
    del outputs


def policy(forward: Callable[..., Outputs], model: Any, ids: Tensor, **given: Any) -> None:
    """Values and the log-probabilities of the tokens, taken from the logits by the caller: PPO's step."""
    logits, _, values = forward(model, ids, **given)
    assert logits is not None
    chosen = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(2))
    (values.square().mean() - chosen.mean()).backward()


def reading(forward: Callable[..., Outputs], model: Any, ids: Tensor, **given: Any) -> None:
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
    trunk = transformers.AutoModelForCausalLM.from_config(described).to(getattr(torch, options.dtype))
    model = AutoModelForCausalLMWithValueHead(trunk, summary_dropout_prob=0.0)
    model.train()
    model.pretrained_model.requires_grad_(not frozen)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


ALONE = {"return_logits": False}
CASES: dict[str, dict[str, Any]] = {
    "values and the loss of labels": {"run": actor_critic},
    "values and the loss of labels, return_logits=False": {"run": actor_critic, "given": ALONE},
    "values and log-probabilities of the logits": {"run": policy},
    "values": {"run": critic},
    "values, return_logits=False": {"run": critic, "given": ALONE},
    "values and the loss of labels, gradient checkpointing": {"run": actor_critic, "checkpointing": True},
    "values, gradient checkpointing, return_logits=False": {"run": critic, "checkpointing": True, "given": ALONE},
    "values, frozen trunk": {"run": critic, "frozen": True},
    "no gradient": {"run": reading},
    "no gradient, return_logits=False": {"run": reading, "given": ALONE},
}


def measure(case: dict[str, Any], options: argparse.Namespace, architecture: str) -> dict[str, float]:
    found = {}
    for way, forward in (("collecting", collecting), ("wrapper", wrapper)):
        changes = {name: case.get(name, False) for name in ("frozen", "checkpointing")}
        model = build(options, **changes, architecture=architecture)
        ids = torch.randint(0, options.vocabulary, (options.rows, options.length))
        with PeakMemory() as peak:
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
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape = f"{options.layers} layers, width {options.width}, vocabulary {options.vocabulary:,}, {options.rows} x {options.length} tokens"
    if not options.json:
        print(f"{shape}, {options.dtype}; MiB at the peak, collecting all hidden states -> wrapper")
    results = {}
    for kind, (name, case) in itertools.product(("gpt2", "llama"), CASES.items()):
        found = results[f"{kind}: {name}"] = measure(case, options, kind)
        if not options.json:
            print(f"  {kind + ': ' + name:64s} {found['collecting']:8.1f} -> {found['wrapper']:8.1f}   x {found['ratio']:.2f}", flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
