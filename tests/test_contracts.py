"""Every registered part keeps its contract (heads_lightning.testing), and each check notices a part that breaks it.

The checks range over the registries, plugins that are installed here included: a new part is tested by being registered.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_models import llama_folder
from objective_pieces import VARIANTS, name_of
from torch import Tensor

from heads_lightning.backbones.transformer import Transformer
from heads_lightning.batch import Attention, Examples
from heads_lightning.composition import prepare_store
from heads_lightning.configs.backbone import backbones
from heads_lightning.configs.head import DefaultLMHeadConfig, LMHeadConfig, LMLossImplementation, MLMHeadConfig, heads
from heads_lightning.configs.objective import CausalConfig, MLMConfig, ObjectiveConfig, objectives
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.heads import DefaultLMHead, MLMHead
from heads_lightning.losses import Projection, default
from heads_lightning.objectives.base import SampleRandom
from heads_lightning.objectives.causal import Causal
from heads_lightning.objectives.mlm import MLM
from heads_lightning.testing import check_backbone, check_head, check_leaks, check_loss, check_objective
from heads_lightning.testing.leaks import peek

prepare_store()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = {name: cls for name, cls in heads.items() if issubclass(cls, LMHeadConfig)}
SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 4}
"""Sizes of every backbone that has such fields."""


def small(name: str, **changes: Any) -> Any:
    """A tiny config of a backbone."""
    cls = backbones[name]
    known = {field.name for field in fields(cls)}
    return cls(**{key: value for key, value in SMALL.items() if key in known} | changes)


def test_every_head_has_a_check() -> None:
    """Heads that score something else than tokens need a check of their own in heads_lightning/testing: write it, then name them here."""
    assert set(heads) - set(HEADS) == {"value"}  # tests/test_value.py


@pytest.mark.parametrize("implementation", [member.value for member in LMLossImplementation])
def test_loss(implementation: str) -> None:
    reason = check_loss(implementation, device=DEVICE)
    if reason is not None:
        pytest.skip(f"only its refusal is checked: {reason}")


@pytest.mark.parametrize("name", HEADS)
def test_head(name: str) -> None:
    check_head(HEADS[name](), device=DEVICE)


@pytest.mark.parametrize(
    "config",
    [DefaultLMHeadConfig(tie_embeddings=True, label_smoothing=0.1), MLMHeadConfig(tie_embeddings=True, logit_softcap=4.0)],
    ids=["default-tied", "mlm-tied"],
)
def test_head_with_options(config: LMHeadConfig) -> None:
    check_head(config, device=DEVICE)


@pytest.mark.parametrize("name", sorted(set(backbones) - {"huggingface"}))  # its weights come from a file: tests/test_huggingface.py
def test_backbone(name: str, tmp_path: Path) -> None:
    check_backbone(small(name, source=str(llama_folder(tmp_path, **SMALL))) if name == "huggingface_import" else small(name))


CAUSAL = [name for name, cls in backbones.items() if Attention.causal in cls.supports and not name.startswith("huggingface")]


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_backbone(name: str) -> None:
    """Also where a field must be set for it, and with the proof that it shows nothing of the future."""
    config = small(name, **backbones[name].fields_for(Attention.causal))
    if config != small(name):
        check_backbone(config)
    found = check_leaks(config)
    assert found.startswith("no leak: perturbation")


@pytest.mark.parametrize("name", objectives)
def test_objective(name: str) -> None:
    check_objective(objectives[name]())


@pytest.mark.parametrize("config", [config for config in VARIANTS if config != type(config)()], ids=name_of)
def test_objective_with_options(config: ObjectiveConfig) -> None:
    check_objective(config)


@pytest.mark.parametrize("name", [name for name, cls in objectives.items() if Attention.encoder_decoder in cls.other_attention])
def test_objective_for_an_encoder_decoder(name: str) -> None:
    check_objective(objectives[name]().fitted(frozenset({Attention.encoder_decoder})), sequence_length=32)


# --------------------------------------------------------------------------------------------- each check notices what it is for


def refuses(check: Callable[..., Any], part: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(part)


def loss_that(change: Callable[..., Any], **attributes: Any) -> types.ModuleType:
    """`default` with its function replaced by one that may call it."""
    module = types.ModuleType("losses.broken")
    module.FEATURES, module.unavailable = default.FEATURES, default.unavailable  # pyright: ignore[reportAttributeAccessIssue]
    module.linear_cross_entropy_sum = change  # pyright: ignore[reportAttributeAccessIssue]
    vars(module).update(attributes)
    return module


def _scaled_gradient(h, p, labels, options, w=None):
    loss = default.linear_cross_entropy_sum(h, p, labels, options, w)
    return loss._replace(total=1.5 * loss.total - 0.5 * loss.total.detach())


def _mean(h, p, labels, options, w=None):
    loss = default.linear_cross_entropy_sum(h, p, labels, options, w)
    return loss._replace(total=loss.total / len(labels))


def _in_place(h, p, labels, options, w=None):
    p.weight_VD.data.mul_(1.001)
    return default.linear_cross_entropy_sum(h, p, labels, options, w)


def _ignored_rows_count(h, p, labels, options, w=None):
    return default.linear_cross_entropy_sum(h, p, labels.clamp(min=0), options, w)


LOSSES = {
    "gradient of the operand": loss_that(_scaled_gradient),
    "no feature, 0% ignored: total": loss_that(_mean),
    "changed in place|total: relative": loss_that(_in_place),
    "40% ignored: total": loss_that(_ignored_rows_count),
    "bias, 0% ignored: total": loss_that(lambda h, p, *rest: default.linear_cross_entropy_sum(h, p._replace(bias_V=None), *rest)),
    "its maths must be": loss_that(
        lambda h, p, *rest: default.linear_cross_entropy_sum(h.float(), p._replace(weight_VD=p.weight_VD.float()), *rest)
    ),
    "more than members": loss_that(_mean, FEATURES=frozenset({"speed"})),
    "must be said with": loss_that(_mean, unavailable=lambda: "no"),
}


@pytest.mark.parametrize("message", LOSSES)
def test_a_broken_loss_is_noticed(message: str) -> None:
    refuses(check_loss, LOSSES[message], message)


def head_that(
    base: type[LMHeadConfig] = DefaultLMHeadConfig, head: type = DefaultLMHead, declares: int = 0, **methods: Any
) -> LMHeadConfig:
    """A config whose head has some methods replaced."""
    broken = type("Broken", (head,), methods)

    def build(self: Any, **where: Any) -> Any:
        return broken(self, **where)

    def num_params(self: Any, d_model: int, vocab_size: int) -> int:
        return base.num_params(self, d_model, vocab_size) + declares

    return type("BrokenConfig", (base,), {"build": build, "num_params": num_params})()


def _half(self: Any, hidden: Tensor) -> Tensor:
    return hidden.bfloat16().to(hidden.dtype)


def _without_bias(self: Any) -> Projection:
    return Projection(self.w_out.matrix(), None, self.config.logit_softcap, self.vocab_size)


def _forgets_the_norm(self: Any, generator: torch.Generator | None = None) -> None:
    torch.nn.init.normal_(self.w_out.weight, generator=generator)
    torch.nn.init.normal_(self.dense.weight, generator=generator)


def _other_random_numbers(self: Any, generator: torch.Generator | None = None) -> None:
    torch.nn.init.normal_(self.w_out.weight)
    torch.nn.init.zeros_(self.w_out.bias)


BROKEN_HEADS = {
    "num_params says": head_that(declares=1),
    "head.bias=True is accepted and ignored": head_that(projection=_without_bias),
    "softcap=0.5 is accepted and ignored": head_that(projection=lambda self: DefaultLMHead.projection(self)._replace(softcap=None)),
    "a position by itself": head_that(prepare=lambda self, hidden: hidden - hidden.mean(dim=-2, keepdim=True)),
    "slope in fp64": head_that(prepare=_half),
    "num_matmul_params": head_that(num_matmul_params=lambda self: self.d_model),
    "as to_empty made it": head_that(MLMHeadConfig, MLMHead, reset_parameters=_forgets_the_norm),
    "generator alone": head_that(reset_parameters=_other_random_numbers),
    "gradient of its own": head_that(prepare=lambda self, hidden: 2 * hidden.detach() - hidden),
    "loss .sum.: relative error": head_that(prepare=lambda self, hidden: hidden * (1 + 1e-3 * (hidden.dtype == torch.float32))),
}


@pytest.mark.parametrize("message", BROKEN_HEADS)
def test_a_broken_head_is_noticed(message: str) -> None:
    refuses(check_head, BROKEN_HEADS[message], message)


def backbone_that(forward: Callable[..., Any] | None = None, declares: int = 0, made: Callable[[Any], Any] | None = None) -> Any:
    """A transformer whose forward pass is wrapped: forward(super's, self, batch, cache)."""

    class Broken(Transformer):
        def forward(self, batch, cache=None):
            plain = super().forward
            return plain(batch, cache) if forward is None else forward(plain, self, batch, cache)

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if made is not None:
                made(self)

    class Config(TransformerConfig):
        def build(self, *, vocab_size, init_device="cpu"):
            return Broken(self, vocab_size=vocab_size, init_device=init_device)

        def num_params(self, vocab_size):
            return super().num_params(vocab_size) + declares

    return Config(**SMALL)


def _peeks(plain, self, batch, cache):
    """The next token shows, a ten-thousandth of it."""
    hidden = plain(batch, cache)
    return hidden + 1e-4 * self.embedding(batch.tokens_BS.roll(-1, 1)) * (torch.arange(hidden.shape[1]) < hidden.shape[1] - 1)[:, None]


def _nothing_after(plain, self, batch, cache):
    return self.norm(self.embedding(batch.tokens_BS))


def _one_segment(plain, self, batch, cache):
    return plain(batch._replace(segments_BS=None), cache)


def _forgetful(plain, self, batch, cache):
    """Reads on from a cache without what was read before."""
    hidden = plain(batch, cache)
    return hidden if cache is None else plain(batch)


def _peeks_where_nothing_is_changed(plain, self, batch, cache):
    """Position 0 sees position 6, which no perturbation of the check changes: only the gradient finds it."""
    shown = []
    handle = self.embedding.register_forward_hook(lambda module, inputs, output: shown.append(output[:, 6:7]))
    hidden = plain(batch, cache)
    handle.remove()
    return hidden + 1e-3 * shown[0] * (torch.arange(hidden.shape[1]) == 0)[:, None]


def _peeks_in_single_precision(plain, self, batch, cache):
    """A leak that tests in fp64 cannot see, as one in a fast kernel would be."""
    hidden = plain(batch, cache)
    if hidden.dtype != torch.float32:
        return hidden
    return hidden + 3 * torch.nn.functional.pad(self.embedding(batch.tokens_BS[:, 1:]), (0, 0, 0, 1))


def _nothing_at_all(plain, self, batch, cache):
    return 0 * plain(batch, cache)


BROKEN_BACKBONES = {
    "num_params says": backbone_that(declares=1),
    "which comes after them": backbone_that(_peeks),
    "which it should": backbone_that(_nothing_after),
    "segments see each other": backbone_that(_one_segment),
    "a cache: reading": backbone_that(_forgetful),
    "disagree on d_model": backbone_that(made=lambda self: setattr(self, "d_model", 31)),
    "leave every parameter and buffer": backbone_that(made=lambda self: self.register_buffer("table", torch.ones(3))),
    "no gradient reaches unused": backbone_that(
        made=lambda self: self.register_parameter("unused", self.norm.weight.__class__(self.norm.weight[:0]))
    ),
}


@pytest.mark.parametrize("message", BROKEN_BACKBONES)
def test_a_broken_backbone_is_noticed(message: str) -> None:
    refuses(check_backbone, BROKEN_BACKBONES[message], message)


LEAKS = {
    "leaks: perturbation": backbone_that(made=lambda self: peek(self, 1e-6)),
    "leaks: gradient": backbone_that(_peeks_where_nothing_is_changed),
    "predicts random tokens with": backbone_that(_peeks_in_single_precision),
    "the perturbation test is blind": backbone_that(_nothing_at_all),
}


@pytest.mark.parametrize("message", LEAKS)
def test_a_leak_is_noticed(message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_leaks(LEAKS[message])


def objective_that(
    change: Callable[..., Examples], base: type[ObjectiveConfig] = CausalConfig, plain: Any = Causal, **declared: Any
) -> Any:
    """An objective whose examples are changed: change(examples, windows, rng)."""

    class Broken(plain):
        def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
            return change(super().examples(tokens_BR, rng, sequence_length), tokens_BR, rng)

    def build(self: Any, vocabulary: Any) -> Any:
        return Broken(self, vocabulary)

    return type("BrokenConfig", (base,), {"build": build, **declared})()


def _from_global_numbers(made: Examples, windows: np.ndarray, rng: SampleRandom) -> Examples:
    return made._replace(tokens_BS=np.random.permutation(made.tokens_BS.T).T.copy())  # noqa: NPY002


def _changes_windows(made: Examples, windows: np.ndarray, rng: SampleRandom) -> Examples:
    windows[:, 0] = 5
    return made


BROKEN_OBJECTIVES = {
    "stands where this position may look": objective_that(lambda made, *_: made._replace(labels_BS=made.tokens_BS.copy())),
    "row 0, position 2: the label": objective_that(
        lambda made, *_: made._replace(labels_BS=np.pad(made.tokens_BS, ((0, 0), (1, 0)))[:, :-1].copy())
    ),
    "every random number": objective_that(_from_global_numbers),
    "neighbours": objective_that(lambda made, *_: made._replace(tokens_BS=np.roll(made.tokens_BS, 1, axis=0))),
    "windows given are changed": objective_that(_changes_windows),
    "labels_BS is int32": objective_that(lambda made, *_: made._replace(labels_BS=made.labels_BS.astype(np.int32))),
    "not contiguous": objective_that(lambda made, *_: made._replace(labels_BS=made.labels_BS[:, ::-1][:, ::-1].T.copy().T)),
    "padding has targets": objective_that(lambda made, *_: made._replace(segments_BS=np.full_like(made.segments_BS, -1))),
    "one run each": objective_that(lambda made, *_: made._replace(segments_BS=made.segments_BS[:, ::-1].copy())),
    "beyond parts": objective_that(lambda made, *_: made._replace(part_BS=np.ones(made.tokens_BS.shape, np.int8))),
    "prefix_BS belongs": objective_that(lambda made, *_: made._replace(prefix_BS=np.ones(made.tokens_BS.shape, bool))),
    "nothing is to be predicted": objective_that(lambda made, *_: made._replace(labels_BS=np.full_like(made.labels_BS, -100))),
    "nothing is hidden": objective_that(lambda made, windows, *_: made._replace(tokens_BS=windows.astype(np.int64)), MLMConfig, MLM),
    "without fim_end must be refused": objective_that(lambda made, *_: made, special_tokens=("fim_end",)),
    "no roles": objective_that(lambda made, *_: made, special_tokens=("begin",)),
    "the config says": objective_that(lambda made, *_: made, attention="bidirectional"),
}


@pytest.mark.parametrize("message", BROKEN_OBJECTIVES)
def test_a_broken_objective_is_noticed(message: str) -> None:
    refuses(check_objective, BROKEN_OBJECTIVES[message], message)
