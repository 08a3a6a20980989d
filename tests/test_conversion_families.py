"""Every family against `transformers`: logits of random tiny models in both directions, and states that come back to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from conversion_models import BERT, CASES, LLAMA, LLAMA3, VOCAB, theirs
from torch import Tensor, nn

from heads_lightning.configs.backbone import NGPTConfig, TransformerConfig
from heads_lightning.configs.head import DefaultLMHeadConfig, NormalizedLMHeadConfig
from heads_lightning.conversion import StateConverter
from heads_lightning.conversion.families import FAMILIES, OWN, Family, NativeModel, family_of_config, family_of_model
from heads_lightning.conversion.folders import special_tokens
from heads_lightning.conversion.native import NativeLM, check_shapes
from heads_lightning.conversion.validation import compare
from heads_lightning.registry import ConfigError


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(model: nn.Module, family: Family, native: NativeModel) -> dict[str, Tensor]:
    """What save_pretrained would write: tied weights once."""
    copies = family.copies(native)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in copies and not family.reason_left_out(name)}


def read(model: Any) -> tuple[Family, NativeModel, NativeLM]:
    """The native model of one of transformers'."""
    config = model.config.to_dict()
    family = family_of_config(config)
    native = family.native(config)
    state = StateConverter(family.templates(native)).convert(weights(model, family, native), family.bounds(native))
    check_shapes(native, {name: tensor.shape for name, tensor in state.items()})
    built = NativeLM(native).eval()
    built.load_state_dict(state)
    return family, native, built


def assert_same_logits(model: Any, native: NativeLM, family: Family, described: NativeModel) -> None:
    assert compare(model, native, family, described).error <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_both_directions(case: str) -> None:
    model = theirs(case)
    family, native, built = read(model)
    assert_same_logits(model, built, family, native)
    # and back: the state to the bit, and a description that transformers reads as the same model
    converter = StateConverter(family.templates(native)).inverse()
    back = converter.convert(built.state_dict(), family.bounds(native))
    want = weights(model, family, native)
    assert back.keys() == want.keys()
    assert all(torch.equal(back[name], want[name]) for name in want)
    assert family.refusal(native) is None
    assert family_of_model(native).refusal(native) is None
    config = transformers.AutoConfig.for_model(family.name, **family.describe(native), **special_tokens(None))
    again = getattr(transformers, family.auto_class).from_config(config)
    if "lm_head.weight" in back and family.name == "t5":
        again.lm_head.weight = torch.nn.Parameter(back["lm_head.weight"])
    missing, unexpected = again.load_state_dict(back, strict=False)
    assert set(missing) <= set(family.copies(native)) | {name for name in missing if family.reason_left_out(name)}
    assert not unexpected
    assert type(again).__name__ == family.architecture
    assert_same_logits(again.eval(), built, family, native)


def test_every_family_is_compared() -> None:
    assert {kind for kind, _ in CASES.values()} | {OWN.name} == set(FAMILIES)


def test_older_spellings_are_read() -> None:
    """transformers 4 wrote rope_theta and rope_scaling, GPT-2's trunk was saved without a prefix, BERT's norms with gamma and beta."""
    family = FAMILIES["llama"]
    new = family.native({"model_type": "llama", **LLAMA, "rope_parameters": LLAMA3})
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")} | {"type": "llama3"}
    assert family.native({"model_type": "llama", **LLAMA, "rope_theta": 500000.0, "rope_scaling": scaling}) == new
    assert FAMILIES["gpt2"].canonical(["wte.weight", "h.0.ln_1.bias"])["transformer.wte.weight"] == "wte.weight"
    names = FAMILIES["bert"].canonical(["embeddings.LayerNorm.gamma", "cls.predictions.bias"])
    assert names == {"bert.embeddings.LayerNorm.weight": "embeddings.LayerNorm.gamma", "cls.predictions.bias": "cls.predictions.bias"}
    modern = BERT | {"model_type": "modernbert", "global_rope_theta": 5000.0, "local_rope_theta": 100.0, "num_hidden_layers": 4}
    backbone = FAMILIES["modernbert"].native(modern).backbone
    assert isinstance(backbone, TransformerConfig)
    assert (backbone.rotary_base, backbone.local_attention.rotary_base, backbone.local_attention.global_layers) == (5000.0, 100.0, [0, 3])


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mixtral", {}, "model_type=mixtral cannot be converted. Did you mean 'mistral'"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act=quick_gelu has no native counterpart"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic has no native counterpart"),
        ("llama", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"num_hidden_layers": None}, "has no num_hidden_layers"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type=relative_key has no native counterpart"),
        ("bert", {"is_decoder": True}, "is_decoder=True"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(kind: str, fields: dict[str, Any], message: str) -> None:
    def describe(config: dict[str, Any]) -> NativeModel:
        return family_of_config(config).native(config)

    with pytest.raises(ConfigError, match=message):
        describe({"model_type": kind, **LLAMA, **fields})


def test_a_native_model_finds_its_family() -> None:
    plain = DefaultLMHeadConfig(bias=False)
    for backbone, head, name in (
        (TransformerConfig(), plain, "llama"),
        (TransformerConfig(), DefaultLMHeadConfig(), "heads_lightning"),  # no architecture has a bias there
        (TransformerConfig(qk_norm=True), plain, "qwen3"),
        (TransformerConfig(), NormalizedLMHeadConfig(), "heads_lightning"),
        (NGPTConfig(), NormalizedLMHeadConfig(), "heads_lightning"),
    ):
        assert family_of_model(NativeModel(backbone, head, VOCAB)).name == name
    with pytest.raises(ConfigError, match=r"family=llama cannot express this model: .*head.has_bias=True .*use heads_lightning"):
        family_of_model(NativeModel(TransformerConfig(), DefaultLMHeadConfig(), VOCAB), "llama")
    with pytest.raises(ConfigError, match="qk_norm=head"):
        family_of_model(NativeModel(TransformerConfig(qk_norm=True), plain, VOCAB), "llama")


def test_a_norm_under_the_wrong_name_is_seen() -> None:
    """OLMo-core 3.0.0 writes both norms of Mistral and Gemma to one name and loses one: here the names alone refuse it."""
    from heads_lightning.conversion.families import decoder
    from heads_lightning.conversion.mapping import ConversionError

    native = FAMILIES["mistral"].native({"model_type": "mistral", **LLAMA, "sliding_window": None})
    broken = decoder.decoder_templates(native, attention_norm="post_attention_layernorm")
    model = theirs("mistral")
    with pytest.raises(ConversionError, match="input_layernorm"):
        StateConverter(broken).convert(weights(model, FAMILIES["mistral"], native), FAMILIES["mistral"].bounds(native))
