"""Mapping templates: the cases of OLMo-core's converter, each way in which it loses weights, and the way back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heads_lightning.conversion import StateConverter, StateMapping, StateMappingTemplate, StateType, TemplatePlaceholder
from heads_lightning.conversion.mapping import ConversionError, NotInvertibleError

LAYER, EXPERT = TemplatePlaceholder.LAYER, TemplatePlaceholder.EXPERT
T = StateMappingTemplate


def numbered(*shape: int, start: int = 0) -> Tensor:
    """Tensors whose entries all differ."""
    return torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(shape)


def state(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {key.replace("__", "."): numbered(*shape, start=1000 * i) for i, (key, shape) in enumerate(shapes.items())}


A, B = numbered(3, 4), numbered(3, 4, start=100)
CASES: dict[str, tuple[list[T], dict[str, Tensor], dict[Any, int], dict[str, Tensor]]] = {
    "one to one": ([T("a", "b")], {"a": A}, {}, {"b": A}),
    "concat on another dim": ([T(("a", "b"), "c", source_concat_dim=1)], {"a": A, "b": B}, {}, {"c": torch.cat((A, B), 1)}),
    "layers to one key": (
        [T(f"x.{LAYER}", "all", source_key_per_placeholder=LAYER)],
        {"x.0": A, "x.1": B},
        {LAYER: 2},
        {"all": torch.cat((A, B))},
    ),
    "chunk": ([T("a", ("b", "c"), dest_chunk_dim=1)], {"a": A}, {}, {"b": A[:, :2], "c": A[:, 2:]}),
    "split by sizes": ([T("a", ("b", "c"), dest_sizes=(1, 3), dest_chunk_dim=1)], {"a": A}, {}, {"b": A[:, :1], "c": A[:, 1:]}),
    "fan out": (
        [T(f"l.{LAYER}.w", f"m.{LAYER}.{EXPERT}", dest_key_per_placeholder=EXPERT)],
        {"l.0.w": A, "l.1.w": B},
        {LAYER: 2, EXPERT: 3},
        {f"m.{i}.{e}": (A, B)[i][e : e + 1] for i in range(2) for e in range(3)},
    ),
    "permute": ([T("a", "b", dims_permutation=(1, 0))], {"a": A}, {}, {"b": A.T}),
    "unflatten, flatten": (
        [T("a", "b", unflatten_dim=(1, (2, 2)), dims_permutation=(1, 0, 2), flatten_dims=(1, 2))],
        {"a": A},
        {},
        {"b": A.view(3, 2, 2).transpose(0, 1).flatten(1)},
    ),
    "placeholder as size": (
        [T("a", "b", unflatten_dim=(0, (EXPERT, -1)), dims_permutation=(1, 0, 2), flatten_dims=(0, 1))],
        {"a": A},
        {EXPERT: 3},
        {"b": A.view(3, 1, 4).transpose(0, 1).flatten(0, 1)},
    ),
    "all at once": (
        [T(("a", "b"), ("c", "d"), unflatten_dim=(0, (2, -1)), dims_permutation=(1, 0, 2), flatten_dims=(1, 2), dest_chunk_dim=1)],
        {"a": A, "b": B},
        {},
        {"c": A, "d": B},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_conversion_and_the_way_back(case: str) -> None:
    templates, source, bounds, want = CASES[case]
    converter = StateConverter(templates)
    got = converter.convert(source, bounds)
    assert list(got) == list(want)
    for key, tensor in got.items():
        assert torch.equal(tensor, want[key])
        assert tensor.is_contiguous()
    back = converter.inverse().convert(got, bounds)
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)


def test_slice_cuts_padding_off_and_cannot_come_back() -> None:
    template = T("a", "b", source_slice=(0, 0, 2))
    assert torch.equal(StateConverter([template]).convert({"a": A})["b"], A[:2])
    with pytest.raises(NotInvertibleError, match="cuts off"):
        template.inverse()
    with pytest.raises(ConversionError, match=r"a \[3, 4\].* 0 to 9 is not within dimension 0"):
        StateConverter([T("a", "b", source_slice=(0, 0, 9))]).convert({"a": A})


def test_a_flattening_of_unknown_sizes_has_no_inverse() -> None:
    with pytest.raises(NotInvertibleError, match="forgets the sizes"):
        T("a", "b", flatten_dims=(0, 1)).inverse()


def test_other_placeholders_can_be_made() -> None:
    head = TemplatePlaceholder("[head]")
    got = StateConverter([T(f"a.{head}", f"b.{head}.w")]).convert({"a.0": A, "a.1": B}, {head: 2})
    assert list(got) == ["b.0.w", "b.1.w"]
    with pytest.raises(ValueError, match="square brackets"):
        TemplatePlaceholder("head")


# ---- templates


@pytest.mark.parametrize(
    ("template", "values", "bounds", "source", "dest"),
    [
        (T("a", "b"), {}, {}, ("a",), ("b",)),
        (T("a", "b"), {LAYER: None}, {LAYER: 2}, ("a",), ("b",)),
        (T(f"a.{LAYER}", f"b.{LAYER}"), {LAYER: 1}, {LAYER: 2}, ("a.1",), ("b.1",)),
        (T((f"a.{LAYER}", f"c.{LAYER}"), (f"b.{LAYER}", f"d.{LAYER}")), {LAYER: 0}, {LAYER: 2}, ("a.0", "c.0"), ("b.0", "d.0")),
        (T(f"a.{LAYER}", "b", source_key_per_placeholder=LAYER), {}, {LAYER: 2}, ("a.0", "a.1"), ("b",)),
        (T("a", f"b.{EXPERT}", dest_key_per_placeholder=EXPERT), {}, {EXPERT: 2}, ("a",), ("b.0", "b.1")),
        (
            T(f"a.{LAYER}.{EXPERT}", f"b.{LAYER}", source_key_per_placeholder=EXPERT),
            {LAYER: 3, EXPERT: None},
            {LAYER: 4, EXPERT: 2},
            ("a.3.0", "a.3.1"),
            ("b.3",),
        ),
    ],
)
def test_a_template_becomes_a_mapping(template: T, values: Any, bounds: Any, source: tuple[str, ...], dest: tuple[str, ...]) -> None:
    mapping = template.to_mapping(values, bounds)
    assert isinstance(mapping, StateMapping)
    assert (mapping.source_keys, mapping.dest_keys) == (source, dest)


@pytest.mark.parametrize(
    ("template", "values", "bounds"),
    [
        (T("a", "b"), {LAYER: 0}, {LAYER: 1}),
        (T(f"a.{LAYER}", f"b.{LAYER}"), {LAYER: None}, {LAYER: 1}),
        (T(f"a.{LAYER}", "b"), {LAYER: 0}, {LAYER: 1}),
        (T("a", f"b.{LAYER}"), {LAYER: 0}, {LAYER: 1}),
        (T(f"a.{LAYER}", "b", source_key_per_placeholder=LAYER), {}, {}),
        (T("a", f"b.{LAYER}", dest_key_per_placeholder=LAYER), {}, {}),
        (T(f"a.{LAYER}", "b", source_key_per_placeholder=LAYER), {LAYER: 0}, {LAYER: 1}),
        (T("a", "b", unflatten_dim=(0, (EXPERT, -1))), {}, {}),
    ],
)
def test_a_template_that_does_not_apply(template: T, values: Any, bounds: Any) -> None:
    assert template.to_mapping(values, bounds) is None


def test_wrong_expansions_are_refused() -> None:
    with pytest.raises(ValueError, match="does not hold"):
        T("a", "b", source_key_per_placeholder=LAYER).to_mapping({}, {LAYER: 2})
    with pytest.raises(ValueError, match="does not hold"):
        T("a", "b", dest_key_per_placeholder=LAYER).to_mapping({}, {LAYER: 2})
    for side in ({"source_key_per_placeholder": LAYER}, {"dest_key_per_placeholder": LAYER}):
        with pytest.raises(ValueError, match="expands one key"):
            T((f"a.{LAYER}", "b"), (f"c.{LAYER}", "d"), **side)
    with pytest.raises(ConversionError, match=r"\[layer\] stands on one side alone"):
        StateConverter([T(f"a.{LAYER}", "b")]).convert({"a.0": A}, {LAYER: 1})


# ---- what must not pass (OLMo-core lets each of these through, or blames the wrong key)


def refused(templates: list[T], source: dict[str, Any], message: str, bounds: Any = None) -> None:
    with pytest.raises(ConversionError, match=message):
        StateConverter(templates).convert(source, bounds or {})


def test_a_destination_made_twice() -> None:
    refused([T("a", "x"), T("b", "x")], {"a": A, "b": B}, r"made twice: x \(from a and from b\)")


def test_uneven_chunks() -> None:
    refused([T("a", ("b", "c"))], {"a": numbered(5, 2)}, r"a \[5, 2\] → b, c: dimension 0 of \(5, 2\) does not split into 2")


def test_more_destinations_than_rows() -> None:
    refused([T("a", ("b", "c", "d", "e"))], {"a": numbered(5, 2)}, "does not split into 4")
    refused([T("a", ("b", "c"), dest_sizes=(2, 2))], {"a": numbered(5, 2)}, "does not split into 2")


def test_a_missing_source_unless_optional() -> None:
    refused([T("a", "b"), T("c", "d")], {"a": A}, "the source lacks c")
    assert list(StateConverter([T("a", "b"), T("c", "d", optional=True)]).convert({"a": A})) == ["b"]


def test_one_of_several_sources_missing_is_the_one_that_is_blamed() -> None:
    experts = T(f"e.{EXPERT}", "all", source_key_per_placeholder=EXPERT)
    refused([experts], {"e.0": A}, "the source lacks e.1", {EXPERT: 2})
    refused([T(("a", "b"), "c", optional=True)], {"a": A}, "the source lacks b")


def test_a_bound_too_small_or_too_large() -> None:
    layers = T(f"a.{LAYER}.w", f"b.{LAYER}.w")
    source = {"a.0.w": A, "a.1.w": B}
    refused([layers], source, r"correspond to nothing: a\.1\.w \[3, 4\] \(\[layer\] has the bound 1\)", {LAYER: 1})
    refused([layers], source, r"the source lacks a\.2\.w", {LAYER: 3})
    refused([layers], source, r"no bound was given for \[layer\]")


def test_a_source_that_corresponds_to_nothing() -> None:
    refused([T("a", "b")], {"a": A, "z": B}, r"these of the source correspond to nothing: z \[3, 4\]")


def test_tensors_without_dimensions() -> None:
    scalar = torch.tensor(3.0)
    assert StateConverter([T("a", "b")]).convert({"a": scalar})["b"].item() == 3.0
    refused([T(("a", "c"), "b")], {"a": scalar, "c": scalar}, "can only be renamed")
    refused([T("a", "b", flatten_dims=(0, 0))], {"a": scalar}, "can only be renamed")


def test_a_dimension_that_is_not_there() -> None:
    vector = numbered(3)
    assert torch.equal(StateConverter([T("a", "b", source_concat_dim=1)]).convert({"a": vector})["b"], vector)
    refused([T(("a", "c"), "b", source_concat_dim=1)], {"a": vector, "c": vector}, "there is no dimension 1")
    refused([T("a", "b", unflatten_dim=(0, (2, 2)))], {"a": vector}, r"a \[3\] → b: ")


def test_types_are_not_promoted() -> None:
    refused([T(("a", "b"), "c")], {"a": A, "b": B.bfloat16()}, "different types")
    assert StateConverter([T("a", "b")]).convert({"a": A.bfloat16()})["b"].dtype == torch.bfloat16


def test_values_that_are_no_tensors() -> None:
    refused([T("a", "b")], {"a": A, "step": 3}, r"not tensors: step \(int\)")


def test_parameters_come_out_as_plain_tensors_that_share_no_memory_unless_renamed() -> None:
    parameter = torch.nn.Parameter(A.clone())
    got = StateConverter([T("a", ("b", "c"), dest_chunk_dim=1), T("a", "same")]).convert({"a": parameter})
    assert not any(tensor.requires_grad for tensor in got.values())
    storages = [tensor.untyped_storage().data_ptr() for tensor in got.values()]
    assert len(set(storages)) == 3
    assert storages[2] == parameter.untyped_storage().data_ptr()
    assert got["b"].untyped_storage().nbytes() == 3 * 2 * 4


def test_nothing_is_computed_before_everything_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []
    apply = StateMapping.apply
    monkeypatch.setattr(StateMapping, "apply", lambda self, tensors: (devices.append(tensors[0].device.type), apply(self, tensors))[1])
    refused([T("a", "b"), T("c", ("d", "e"))], {"a": A, "c": numbered(5)}, "does not split")
    assert set(devices) == {"meta"}


def test_experts_without_a_bound_are_a_dense_model() -> None:
    templates = [T("a", "b"), T(f"e.{EXPERT}", f"f.{EXPERT}")]
    assert list(StateConverter(templates).convert({"a": A})) == ["b"]


def test_modules_are_matched_by_name_and_need_not_be_complete() -> None:
    converter = StateConverter([T(f"layers.{LAYER}", f"blocks.{LAYER}", StateType.module), T("w", "v")])
    mappings = converter.get_mappings({"layers.0": None, "layers.1": None, "layers.1.mlp": None}, {LAYER: 3}, StateType.module)
    assert [(m.source_keys, m.dest_keys) for m in mappings] == [(("layers.0",), ("blocks.0",)), (("layers.1",), ("blocks.1",))]


def test_large_mixtures_of_experts_are_enumerated_fast() -> None:
    """One pass over templates, layers and experts; the names alone are looked at."""
    templates = [T(f"m.{LAYER}.{EXPERT}.{i}", f"n.{LAYER}.{EXPERT}.{i}") for i in range(3)]
    names = {f"m.{layer}.{e}.{i}": torch.empty(0, device="meta") for layer in range(8) for e in range(32) for i in range(3)}
    assert len(StateConverter(templates).get_mappings(names, {LAYER: 8, EXPERT: 32})) == len(names)
