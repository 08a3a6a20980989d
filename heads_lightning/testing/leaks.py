"""Proof that a backbone shows its objectives nothing of the future: three tests, each with a control that must fail it.

- Perturbation: another token at one position changes no hidden state before it. In fp64 with enlarged weights: where branches are
  multiplied, a leak at the usual initialisation is ten times smaller than fp32's rounding, and a test with small weights passes it.
- Gradient: no hidden state has a gradient with respect to a later embedding. It finds paths that one perturbation happens to miss.
- Independent tokens: nothing predicts a uniform random token better than ln V on fresh data. A loss clearly below it is proof of a
  leak, with no assumption about where; and it is the very number that a leak makes look brilliant in training.

The control of each is the same network reading in both directions or, where it has no such mode, one to which the next token's embedding
is added. A test that does not catch its control is blind, and says so instead of passing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.configs.head import DefaultLMHeadConfig
from heads_lightning.testing.backbones import LEAK, batch_of, changed_at, draw_tokens, enlarged

VOCABULARY = 50
"""Tokens of the independent-token test: ln 50 = 3.912 nats."""
MARGIN = 0.02
"""Nats below ln V that count as a leak: ten standard deviations of the mean over the last steps."""
CAUGHT = 1.0
"""Nats below which a leaking control must come."""


class Influence(NamedTuple):
    """How strongly hidden states depend on tokens."""

    future: float
    """Of tokens after them: the largest. Rounding at most, or there is a leak."""
    past: float
    """Of tokens before them and their own: the smallest. Must not be small, or the test sees nothing."""


def perturbation_influence(model: nn.Module, attention: Attention = Attention.causal, *, size: int = 24) -> Influence:
    """Change one token at a time; fp64 models with enlarged weights alone give a meaningful answer."""
    one, future, past = draw_tokens(2, size), 0.0, math.inf
    for at in (1, size // 2, size - 1):
        other = one.clone()
        other[:, at] = (other[:, at] + 1) % 61
        change = changed_at(model, batch_of(one, attention), batch_of(other, attention))
        future, past = max(future, float(change[:at].max())), min(past, float(change[at:].min()))
    return Influence(future, past)


def gradient_influence(model: Any, attention: Attention = Attention.causal, *, size: int = 24) -> Influence:
    """Gradients of single hidden states with respect to every embedding; largest absolute entry of each position."""
    future, past = 0.0, math.inf
    leaves: list[Tensor] = []

    def detach(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.embedding.register_forward_hook(detach)
    try:
        hidden_BSD = model(batch_of(draw_tokens(2, size), attention))
    finally:
        handle.remove()
    weight_D = torch.randn(hidden_BSD.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden_BSD)
    for at in (0, size // 2, size - 2):
        (gradient_BSD,) = torch.autograd.grad((hidden_BSD[:, at] @ weight_D).sum(), leaves, retain_graph=True)
        of_S = gradient_BSD.abs().amax(dim=(0, 2))
        future, past = max(future, float(of_S[at + 1 :].max())), min(past, float(of_S[: at + 1].min()))
    return Influence(future, past)


def independent_token_losses(
    config: BackboneConfig,
    attention: Attention = Attention.causal,
    *,
    steps: int = 400,
    learning_rate: float = 5e-3,
    rows: int = 16,
    size: int = 32,
    seed: int = 0,
    prepared: Callable[[Any], Any] | None = None,
) -> list[float]:
    """Loss (nats a token) of every step of training to predict the next of uniform random tokens, fresh ones at every step.

    Args:
        config: of the backbone; small, for seconds.
        attention: what each position sees. Labels are the next tokens whatever it is: with bidirectional they stand in plain sight.
        steps: of AdamW.
        learning_rate: its peak; the last third falls to 0.
        rows, size: of a batch.
        seed: of weights and data.
        prepared: changes the built backbone before training.
    """
    generator = torch.Generator().manual_seed(seed)
    backbone = config.build(vocab_size=VOCABULARY)
    head = DefaultLMHeadConfig().build(d_model=config.d_model, vocab_size=VOCABULARY)
    for module in (backbone, head):
        module.reset_parameters(generator)
    if prepared is not None:
        prepared(backbone)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, 3 * (1 - step / steps))
        drawn = torch.randint(0, VOCABULARY, (rows, size + 1), generator=generator)
        batch = batch_of(drawn[:, :-1], attention)
        loss = head(backbone(batch), labels=drawn[:, 1:], return_logits=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        backbone.after_optimizer_step()
        losses.append(float(loss.detach()))
    return losses


def final_loss(losses: list[float]) -> float:
    """Mean over the last fifth of the steps."""
    last = losses[-max(1, len(losses) // 5) :]
    return sum(last) / len(last)


def sees_everything(config: BackboneConfig) -> tuple[BackboneConfig, Attention, Callable[[Any], Any]]:
    """The control of a causal backbone: config, attention, and what to do to the built module."""
    if fields := config.fields_for(Attention.bidirectional):
        return replace(config, **fields), Attention.bidirectional, lambda model: None
    if Attention.bidirectional in config.attention_supported():
        return config, Attention.bidirectional, lambda model: None
    return config, Attention.causal, peek


def peek(model: Any, share: float = 1.0) -> Any:
    """Add to each token's embedding a share of the next one's; returns the handle of the hook."""

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + share * F.pad(output[:, 1:], (0, 0, 0, 1))

    return model.embedding.register_forward_hook(add)


def check_leaks(config: BackboneConfig, *, steps: int = 400) -> str:
    """All three tests of a causal backbone and their controls; returns one line with what was found.

    Args:
        config: small: it is trained twice for `steps` steps. 0 leaves the test of independent tokens out.

    Raises:
        AssertionError: there is a leak, or a test is blind.
    """
    assert Attention.causal in config.attention_supported(), f"backbone={config.name} has no causal attention to check"
    seeing, attention, prepare = sees_everything(config)
    found = []
    for name, influence in (("perturbation", perturbation_influence), ("gradient", gradient_influence)):
        control = enlarged(seeing)
        prepare(control)
        ours, theirs = influence(enlarged(config)), influence(control, attention)
        assert ours.future <= LEAK * max(1.0, ours.past), f"backbone={config.name} leaks: {name} of a later token by {ours.future:.1e}"
        assert ours.past > 1e4 * max(ours.future, LEAK), f"the {name} test is blind: what may be seen shows as {ours.past:.1e}"
        assert theirs.future > 1e4 * LEAK, f"the {name} test is blind: a control that sees everything shows {theirs.future:.1e}"
        found.append(f"{name} {ours.future:.0e} (control {theirs.future:.0e})")
    if steps:
        ours = final_loss(independent_token_losses(config, steps=steps))
        theirs = final_loss(independent_token_losses(seeing, attention, steps=steps, prepared=prepare))
        least = math.log(VOCABULARY)
        assert ours >= least - MARGIN, f"backbone={config.name} leaks: it predicts random tokens with {ours:.3f} nats, ln V is {least:.3f}"
        assert theirs < CAUGHT, f"the test of independent tokens is blind: a control that sees everything reaches {theirs:.3f} nats only"
        found.append(f"independent tokens {ours:.3f} of {least:.3f} nats (control {theirs:.3f})")
    return "no leak: " + ", ".join(found)
