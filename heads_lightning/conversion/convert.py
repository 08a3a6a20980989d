"""A conversion from start to end: open, plan, check, stream, run both models, and only then give the folder its name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from heads_lightning import __version__
from heads_lightning.backbones.ssm import S4D
from heads_lightning.batch import Attention
from heads_lightning.configs.requests import ConvertRequest, ConvertTarget
from heads_lightning.conversion import folders, streaming
from heads_lightning.conversion.converter import StateConverter
from heads_lightning.conversion.families import OWN, Family, NativeModel, family_of_model
from heads_lightning.conversion.families.value import VHead
from heads_lightning.conversion.folders import Checkpoint, open_checkpoint
from heads_lightning.conversion.mapping import ConversionError, StateMapping, StateMappingTemplate, listed
from heads_lightning.conversion.native import NativeLM, check_shapes
from heads_lightning.conversion.sources import TensorSource, open_weights
from heads_lightning.conversion.validation import compare, compare_in, open_huggingface, require_transformers
from heads_lightning.registry import ConfigError

VOCABULARY = ("backbone.embedding.weight", "head.w_out.weight", "head.w_out.bias", "head.sz", "head.lm_head.w_out.weight")
"""Native weights with a row per vocabulary entry."""


@dataclass
class Conversion:
    """What was done; written to conversion.json."""

    source: str
    """What the user called it."""
    form: str
    """huggingface or native."""
    family: str
    """model_type on the Hugging Face side."""
    tensors: int = 0
    """Tensors written."""
    bytes: int = 0
    """Bytes of them."""
    dtypes: list[str] = field(default_factory=list)
    """Their types."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Weights of the source that were not converted, and why."""
    validated: Any = False
    """Largest relative difference of logits and how it was measured, or false where it was not asked for."""
    tokens: dict[str, Any] = field(default_factory=dict)
    """Special token ids of the source."""
    notes: list[str] = field(default_factory=list)
    """What else one should know about the result."""
    version: str = __version__
    """Of heads_lightning."""
    seconds: float = 0.0
    """Time taken."""


@dataclass
class Plan:
    """A conversion that was checked on names and shapes, before anything is written."""

    checkpoint: Checkpoint
    family: Family
    model: NativeModel
    """What the native side is."""
    source: TensorSource
    """The source's tensors under the names that the mappings use."""
    mappings: list[StateMapping]
    left_out: dict[str, str]
    copies: dict[str, str]


def convert(request: ConvertRequest, *, say: Callable[[str], None] = print) -> Conversion:
    """Convert as asked.

    Raises:
        ConfigError: the source cannot be read or expressed, or the target exists.
        ConversionError: weights do not correspond, or the two models disagree. Nothing bears the target's name then.
    """
    began = time.monotonic()
    if request.validate:
        require_transformers()
    target = streaming.Target(Path(request.out).expanduser())
    checkpoint = open_checkpoint(request.from_, run_root=request.run_root)
    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    planned = plan(checkpoint, request)
    shards = streaming.plan(planned.mappings, planned.source, dtype=dtype, shard_bytes=int(request.shard_gb * 2**30))
    specs = {name: spec for shard in shards for name, spec in shard.specs.items()}
    _check(planned, specs, to_native=request.to == ConvertTarget.native)
    _check_copies(planned)
    done = streaming.stream(shards, planned.source, target, dtype=dtype, say=say)
    if done.shards_found:
        say(f"{done.shards_found} shards were there already, from an attempt that was stopped")
    dtypes = _dtypes(planned, specs)
    _write_files(planned, target, request, dtypes)
    record = Conversion(
        request.from_, str(request.to), planned.family.name, len(specs), sum(map(streaming.bytes_of, specs.values())), dtypes
    )
    record.notes = _notes(planned, request)
    record.left_out, record.tokens = planned.left_out, checkpoint.tokens
    if request.validate:
        record.validated = _validate(planned, target, request)
    record.seconds = round(time.monotonic() - began, 3)
    target.write(folders.RECORD, json.dumps(asdict(record), indent=2) + "\n")
    target.finish()
    return record


def plan(checkpoint: Checkpoint, request: ConvertRequest) -> Plan:
    """Names on both sides, checked.

    Raises:
        ConfigError: the family asked for cannot express the model.
        ConversionError: weights do not correspond.
    """
    model = checkpoint.model
    family = checkpoint.family or family_of_model(model, request.family)
    if checkpoint.family is not None and request.family not in (None, family.name):
        raise ConfigError(f"family={request.family}, but {request.from_} is of model_type={family.name}; leave family out")
    model, cut = _cut_vocabulary(model, request.vocab_size)
    source, left_out, copies = _named(checkpoint, family, model)
    templates = _templates(checkpoint, family, model, request.to, source)
    if cut is not None and checkpoint.form == request.to:
        raise ConfigError("vocab_size cuts padding off on the way from one form to the other; leave it out here")
    mappings = StateConverter([_sliced(t, cut) for t in templates]).get_mappings(source.specs, family.bounds(model))
    return Plan(checkpoint, family, model, source, mappings, left_out, copies)


def _cut_vocabulary(model: NativeModel, vocab_size: int | None) -> tuple[NativeModel, int | None]:
    if vocab_size is None or vocab_size == model.vocab_size:
        return model, None
    if vocab_size > model.vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size} is more than the {model.vocab_size} rows that there are; it cuts padding off, it adds none"
        )
    return replace(model, vocab_size=vocab_size), vocab_size


def _sliced(template: StateMappingTemplate, rows: int | None) -> StateMappingTemplate:
    """The template, cut to the first rows where it is about the vocabulary."""
    sides = (template.source_template_keys, template.dest_template_keys)
    return replace(template, source_slice=(0, 0, rows)) if rows is not None and set(sides) & set(VOCABULARY) else template


def _templates(
    checkpoint: Checkpoint, family: Family, model: NativeModel, to: ConvertTarget, source: TensorSource
) -> list[StateMappingTemplate]:
    """From the source's names to the target's; the same names where both are of one form."""
    templates = [t for t in family.templates(model) if t.state_type == "weight"]
    if checkpoint.form == to:
        exact = {key for t in templates if t.keeps_type for m in t.mappings(family.bounds(model)) for key in (*m.source_keys, *m.dest_keys)}
        return [StateMappingTemplate(name, name, keeps_type=name in exact) for name in source.specs]
    return templates if to == ConvertTarget.native else [template.inverse() for template in templates]


class _Renamed(TensorSource):
    """A source under other names."""

    def __init__(self, inner: TensorSource, names: dict[str, str]) -> None:
        self.inner, self.names = inner, names
        self.specs = {ours: inner.specs[theirs] for ours, theirs in names.items()}

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner.read(self.names[name], into)

    def opened(self, name: str) -> Any:
        return self.inner.opened(self.names[name])

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def _named(checkpoint: Checkpoint, family: Family, model: NativeModel) -> tuple[TensorSource, dict[str, str], dict[str, str]]:
    """The source under the names of the templates, what is left out of it and why, and which tensors repeat another."""
    if checkpoint.form == "native":
        parts = ("backbone.", "head.")
        others = {name: "no weight of the model" for name in checkpoint.weights.specs if not name.startswith(parts)}
        return _Renamed(checkpoint.weights, {n: n for n in checkpoint.weights.specs if n not in others}), others, {}
    names = family.canonical(checkpoint.weights.specs)
    left_out = {name: reason for name in names if (reason := family.reason_left_out(name)) is not None}
    copies = {copy: original for copy, original in family.copies(model).items() if copy in names and original in names}
    left_out |= {copy: f"the same as {original}" for copy, original in copies.items()}
    source = _Renamed(checkpoint.weights, {ours: theirs for ours, theirs in names.items() if ours not in left_out})
    return source, left_out, {names[copy]: names[original] for copy, original in copies.items()}


def _check(planned: Plan, made: dict[str, torch.Tensor], *, to_native: bool) -> None:
    """The native side is the model exactly: nothing random, nothing without a place."""
    native = made if to_native or planned.checkpoint.form == "native" else None
    if native is None:
        return
    if not to_native:  # sources of an export, cut as the target is
        native = planned.source.specs
        rows = planned.model.vocab_size
        native = {n: s[:rows] if n in VOCABULARY and len(s) > rows else s for n, s in native.items()}
    check_shapes(planned.model, {name: spec.shape for name, spec in native.items()})


def _check_copies(planned: Plan) -> None:
    """A weight that config.json says is another one must be it."""
    source = planned.checkpoint.weights
    wrong = [copy for copy, original in planned.copies.items() if not torch.equal(source.read(copy), source.read(original))]
    if wrong:
        raise ConversionError(f"config.json ties weights that differ: {listed(f'{copy} and {planned.copies[copy]}' for copy in wrong)}")


def _write_files(planned: Plan, target: streaming.Target, request: ConvertRequest, dtypes: list[str]) -> None:
    if request.to == ConvertTarget.native:
        files: Any = folders.native_files(planned.checkpoint, planned.model)
    else:
        files = folders.huggingface_files(planned.checkpoint, planned.family, planned.model, dtypes[0] if len(dtypes) == 1 else "float32")
    for name, content in files.items():
        target.write(name, content)


def _validate(planned: Plan, target: streaming.Target, request: ConvertRequest) -> dict[str, Any]:
    """Run both sides on the same batch, from the files as they were written."""
    written = open_weights(target.partial)
    native = written if request.to == ConvertTarget.native else planned.source
    if planned.checkpoint.form == request.to:
        _compare_bits(planned, written, request)
        return {"method": "bits" if request.dtype is None else "values in the new type"}
    imported = planned.checkpoint.form == "huggingface"
    theirs = Path(planned.checkpoint.name).expanduser() if imported else target.partial
    ours = load_native(planned.model, native)
    model = open_huggingface(theirs, planned.family)
    if request.dtype is not None:  # the side that was not written has more digits: both are compared with those that were
        _round(model if imported else ours, getattr(torch, request.dtype), planned)
    agreement = compare(model, ours, planned.family, planned.model)
    stored = _dtypes(planned, written.specs)
    if len(stored) == 1 and (half := getattr(torch, stored[0])) in (torch.bfloat16, torch.float16):
        agreement = compare_in(half, model, ours, planned.family, planned.model, agreement)
    return {"method": "logits", **asdict(agreement)}


@torch.no_grad()
def _round(model: torch.nn.Module, dtype: torch.dtype, planned: Plan) -> None:
    """Round a model's weights to a type, as the written ones were."""
    exact = {key for m in planned.mappings if m.keeps_type for key in (*m.source_keys, *m.dest_keys)}
    systems = {id(parameter) for module in model.modules() if isinstance(module, S4D) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if name not in exact and id(parameter) not in systems:
            parameter.copy_(parameter.to(dtype).float())


def _dtypes(planned: Plan, specs: Mapping[str, torch.Tensor]) -> list[str]:
    """Types of the weights, but for those that keep their own."""
    exact = {key for mapping in planned.mappings if mapping.keeps_type for key in mapping.dest_keys}
    floating = {spec.dtype for name, spec in specs.items() if spec.is_floating_point() and name not in exact}
    return sorted(str(dtype).removeprefix("torch.") for dtype in floating)


def _notes(planned: Plan, request: ConvertRequest) -> list[str]:
    """Lines about a conversion that is right, and of which one should know something."""
    model, notes = planned.model, []
    exported = request.to == ConvertTarget.huggingface
    if exported and model.attention == Attention.prefix:
        notes.append(f"trained with a prefix that sees itself whole; {planned.family.architecture} reads it from left to right")
    if exported and planned.family.name == OWN.name:
        notes.append("no architecture of transformers expresses this model: it opens after `import heads_lightning.conversion.auto`")
    if exported and planned.family.name == "BiGS":
        notes.append("transformers itself has no BiGS: it opens after `import heads_lightning`")
    if isinstance(planned.family, VHead):
        where = (
            "head.lm_weight=1 keeps the projection; 0 trains values alone" if not exported else "a plain AutoModelForCausalLM ignores it"
        )
        notes.append(f"the value head is v_head.summary, beside the projection ({where})")
    return notes


def _compare_bits(planned: Plan, written: TensorSource, request: ConvertRequest) -> None:
    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    exact = {key for mapping in planned.mappings if mapping.keeps_type for key in mapping.dest_keys}
    for name in planned.source.specs:
        want = streaming.cast(planned.source.read(name), None if name in exact else dtype)
        if not torch.equal(want[: len(written.specs[name])] if want.ndim else want, written.read(name)):
            raise ConversionError(f"{name} was not written as it was read")


def load_native(model: NativeModel, source: TensorSource) -> NativeLM:
    """The native model with a source's weights, in fp32, in evaluation mode."""
    built = NativeLM(model).eval()
    parameters = built.state_dict()
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = source.read(name)
            parameter.copy_(tensor[: len(parameter)] if name in VOCABULARY else tensor)
    return built


def summary(record: Conversion, out: str) -> str:
    """What the command prints at the end."""
    lines = [f"{out}: {record.tensors} tensors, {record.bytes / 1e9:.3f} GB, {', '.join(record.dtypes)}, {record.family} ({record.form})"]
    by_reason: dict[str, list[str]] = {}
    for name, reason in record.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"left out: {listed(names)}: {reason}" for reason, names in by_reason.items()]
    lines += record.notes
    if not record.validated:
        return "\n".join([*lines, "not validated (validate=false)"])
    if "error" in record.validated:
        return "\n".join(
            [*lines, f"validated: logits of {record.validated['positions']} positions agree within {record.validated['error']:.1e}"]
        )
    return "\n".join([*lines, f"validated: {record.validated['method']}"])
