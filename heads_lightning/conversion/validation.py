"""Both models run on one fixed batch: logits must agree, and where they do not, the first module that drifts is named.

Weights of any type are compared in fp32, where a mapping that is right leaves rounding alone. Models stored in half precision run in it
too, and ours may be no farther from the fp32 result than twice the distance of `transformers`' own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heads_lightning.batch import Attention
from heads_lightning.configs.layers import Position
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion.converter import StateConverter
from heads_lightning.conversion.families.base import Family, NativeModel
from heads_lightning.conversion.families.value import VHead
from heads_lightning.conversion.mapping import ConversionError, StateType, listed
from heads_lightning.conversion.native import NativeLM
from heads_lightning.heads.value import ValueHead
from heads_lightning.registry import ConfigError

TOLERANCE = 1e-5
"""Largest relative difference of the logits of one position in fp32. Rounding leaves some 1e-6."""
LENGTH, SHORT = 96, 3
"""Positions of the longest row and of the shortest; the others are padded."""
LONGEST = 1100
"""Positions at most, where a window is to be exceeded."""


class ValidationBatch(NamedTuple):
    """Three rows: full, half, and three tokens."""

    tokens_BS: Tensor
    mask_BS: Tensor
    """1 for tokens, 0 for padding (on the right)."""


@dataclass
class Agreement:
    """How far the two models are apart."""

    error: float
    """Largest relative difference of the logits of one position, fp32."""
    positions: int
    """Positions compared."""
    outputs: list[str] = field(default_factory=lambda: ["logits"])
    """What was compared at each: logits, values."""
    half: tuple[float, float] | None = None
    """Distance of ours and of theirs from fp32, in the stored type."""


def validation_batch(model: NativeModel, seed: int = 0) -> ValidationBatch:
    """The batch, from a seed; longer than a sliding window where that is at most LONGEST."""
    length, config = LENGTH, model.backbone
    if isinstance(config, TransformerConfig):
        window = config.local_attention.window or 0
        length = min(max(length, window + 16), LONGEST)
        length = min(length, config.max_positions) if config.position == Position.learned else length
    tokens = torch.randint(0, model.vocab_size, (3, length), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([length, length // 2 + 1, min(SHORT, length)])
    return ValidationBatch(tokens, (torch.arange(length) < lengths[:, None]).long())


def require_transformers() -> None:
    """Refuse to validate without transformers: said before anything is converted."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "validation runs transformers, which is not installed: pip install 'heads-lightning[huggingface]', or validate=false"
        )


def open_huggingface(folder: Path, family: Family, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a folder, by transformers, which may find nothing missing.

    Raises:
        ConfigError: transformers is not installed.
        ConversionError: weights would be left at their random initialisation.
    """
    require_transformers()
    import transformers

    from heads_lightning.conversion import auto

    auto.register()
    how: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False, "use_safetensors": None}
    was = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        if isinstance(family, VHead):
            from heads_lightning.models.value import AutoModelForCausalLMWithValueHead

            return AutoModelForCausalLMWithValueHead.from_pretrained(folder, **how).eval()
        model, found = getattr(transformers, family.auto_class).from_pretrained(folder, **how, output_loading_info=True)
    finally:
        transformers.logging.set_verbosity(was)
    if found["missing_keys"] or found.get("mismatched_keys"):
        raise ConversionError(
            f"transformers finds no weights for {listed(map(str, [*found['missing_keys'], *found.get('mismatched_keys', [])]))}"
        )
    return model.eval()


Outputs = dict[str, Tensor]
"""`logits` [B, S, V], `values` [B, S, K]: what a model gives."""


def compare(theirs: nn.Module, ours: NativeLM, family: Family, model: NativeModel, *, tolerance: float = TOLERANCE) -> Agreement:
    """Run both and compare.

    Args:
        theirs: transformers' model, fp32.
        ours: the native model, fp32.
        family: how modules correspond.
        model: sizes of the native model. Its vocabulary may be a part of theirs; the first entries are compared.
        tolerance: largest relative difference that passes.

    Raises:
        ConversionError: they differ; the message names the first module whose output does.
    """
    batch = validation_batch(model)
    pairs = _module_pairs(theirs, ours, family, model)
    with torch.no_grad(), _recorded(theirs, [a for a, _ in pairs]) as left, _recorded(ours, [b for _, b in pairs]) as right:
        want, got = run_theirs(theirs, batch, family, model), run_ours(ours, batch, model.attention or family.attention)
    errors = distances(got, want, batch)
    for name, error in errors.items():
        if not error <= tolerance:
            raise ConversionError(
                f"the {name} differ by {error:.1e} where {tolerance:.0e} is allowed. {_first_drift(pairs, left, right, batch, tolerance)}"
            )
    return Agreement(max(errors.values()), int(batch.mask_BS.sum()), sorted(errors))


def compare_in(
    dtype: torch.dtype, theirs: nn.Module, ours: NativeLM, family: Family, model: NativeModel, agreement: Agreement
) -> Agreement:
    """The same in half precision, both against fp32. Converts both models.

    Raises:
        ConversionError: ours is more than twice as far from fp32 as theirs.
    """
    batch, attention = validation_batch(model), model.attention or family.attention
    with torch.no_grad():
        exact = run_theirs(theirs, batch, family, model)
        rough, got = run_theirs(theirs.to(dtype), batch, family, model), run_ours(ours.to(dtype), batch, attention)
    agreement.half = (max(distances(got, exact, batch).values()), max(distances(rough, exact, batch).values()))
    if agreement.half[0] > 2 * agreement.half[1] + TOLERANCE:
        raise ConversionError(f"in {dtype} ours is {agreement.half[0]:.1e} from fp32, transformers' own {agreement.half[1]:.1e}")
    return agreement


def run_theirs(theirs: nn.Module, batch: ValidationBatch, family: Family, model: NativeModel) -> Outputs:
    """What transformers makes of the batch. A decoder beside an encoder reads the same tokens backwards."""
    given = {"decoder_input_ids": batch.tokens_BS.flip(1)} if family.attention == Attention.encoder_decoder else {}
    found = theirs(batch.tokens_BS, attention_mask=batch.mask_BS, **given)
    if isinstance(family, VHead):
        logits_BSV, _, values_BS = found
        return {"logits": logits_BSV[..., : model.vocab_size], "values": values_BS[..., None]}
    if model.head.predicts == "value":
        return {"values": found.logits}
    return {"logits": found.logits[..., : model.vocab_size]}


def run_ours(ours: NativeLM, batch: ValidationBatch, attention: Attention) -> Outputs:
    """What the native model makes of the same."""
    tokens, mask = batch
    if attention == Attention.encoder_decoder:
        return {"logits": ours(tokens.flip(1), mask, attention=attention, encoder_tokens_BT=tokens)}
    hidden_BSD = ours.hidden(tokens, mask, attention=Attention.causal if attention == Attention.prefix else attention)
    if not isinstance(ours.head, ValueHead):
        return {"logits": ours.head(hidden_BSD)}
    found = {"values": ours.head(hidden_BSD)}
    return found if ours.head.lm_head is None else found | {"logits": ours.head.lm_head(hidden_BSD)}


def distances(got: Outputs, want: Outputs, batch: ValidationBatch) -> dict[str, float]:
    """How far the outputs are apart. Values are measured against their spread, since one may be 0 by itself."""
    assert got.keys() == want.keys()
    found = {name: distance(got[name], want[name], batch) for name in got.keys() - {"values"}}
    if "values" in got:
        mask = batch.mask_BS.bool()
        values, wanted = got["values"][mask].double(), want["values"][mask].double()
        found["values"] = float((values - wanted).abs().max() / wanted.square().mean().sqrt().clamp(min=1e-30))
    return found


def distance(got: Tensor, want: Tensor, batch: ValidationBatch) -> float:
    """Largest relative difference of one position, padding left out."""
    mask = batch.mask_BS.bool()
    got, want = got[mask].double(), want[mask].double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)).max())


def _module_pairs(theirs: nn.Module, ours: nn.Module, family: Family, model: NativeModel) -> list[tuple[str, str]]:
    converter = StateConverter(family.templates(model))
    names, own = dict(theirs.named_modules()), dict(ours.named_modules())
    mappings = converter.get_mappings(names, family.bounds(model), StateType.module)
    return [(m.source_keys[0], m.dest_keys[0]) for m in mappings if m.dest_keys[0] in own]


@contextmanager
def _recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of some modules, in the order in which they ran."""
    outputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _first_drift(
    pairs: list[tuple[str, str]], left: dict[str, Tensor], right: dict[str, Tensor], batch: ValidationBatch, tolerance: float
) -> str:
    """Which module is the first whose output differs by more than the tolerance, in the order in which ours ran."""
    theirs_of = {ours: theirs for theirs, ours in pairs}
    agreed = 0
    for ours in right:
        theirs = theirs_of[ours]
        if theirs not in left or left[theirs].shape != right[ours].shape:
            continue
        error = distance(right[ours], left[theirs], batch)
        if not error <= tolerance:
            return f"The first module that drifts is {theirs} ({ours} here), by {error:.1e}; {agreed} before it agree"
        agreed += 1
    return f"All {agreed} modules that were compared agree, so it is what comes after them: the head"
