"""Every family against `transformers`: logits of random tiny models in both directions, and states that come back to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from conversion_models import BERT, BIGS, CASES, GPT2, LLAMA, LLAMA3, T5, VOCAB, theirs
from torch import Tensor

from heads_lightning import AutoModelForCausalLMWithValueHead
from heads_lightning.configs.head import DefaultLMHeadConfig, NormalizedLMHeadConfig
from heads_lightning.configs.transformer import NGPTConfig, TransformerConfig
from heads_lightning.conversion import StateConverter
from heads_lightning.conversion.families import (
    FAMILIES,
    OWN,
    Family,
    NativeModel,
    effective,
    family_of_config,
    family_of_model,
    with_values,
)
from heads_lightning.conversion.families.base import HARMLESS
from heads_lightning.conversion.folders import special_tokens
from heads_lightning.conversion.native import NativeLM, check_shapes
from heads_lightning.conversion.validation import compare
from heads_lightning.models.bigs import PUBLISHED_NAMES, ours_from_published
from heads_lightning.registry import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(model: Any, family: Family, native: NativeModel) -> dict[str, Tensor]:
    """What save_pretrained would write: tied weights once."""
    if family.name == "BiGS":  # under its published names, which are not those of its modules
        return {name: tensor for name, tensor in zip(map(published, model.state_dict()), model.state_dict().values(), strict=True) if name}
    copies = family.copies(native)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in copies and not family.reason_left_out(name)}


def published(name: str) -> str | None:
    """The name in a file of a parameter of BiGS; None for the copy that is not written."""
    if name == "cls.decoder.weight":
        return None
    for in_file, here in reversed(PUBLISHED_NAMES):
        name = name.replace(here, in_file, 1)
    return name


def read(model: Any) -> tuple[Family, NativeModel, NativeLM]:
    """The native model of one of transformers'."""
    config = model.config.to_dict()
    family = family_of_config(config)
    native = family.native(config)
    family = family.of_model(native)
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
    given = {ours_from_published(n): tensor for n, tensor in back.items()} if family.name == "BiGS" else back
    missing, unexpected = again.load_state_dict(given, strict=False)
    missing = [name for name in missing if name != "cls.decoder.weight"]  # BiGS's copy of the embedding
    assert set(missing) <= set(family.copies(native)) | {name for name in missing if family.reason_left_out(name)}
    assert not unexpected
    assert type(again).__name__ == family.architecture
    assert_same_logits(again.eval(), built, family, native)


def test_every_family_is_compared() -> None:
    assert {kind for kind, _ in CASES.values()} | {OWN.name} == set(FAMILIES)


@pytest.mark.parametrize("family", with_values(), ids=lambda family: f"{family.name}-{family.auto_class}")
def test_value_heads_in_both_directions(family: Family) -> None:
    plain = theirs(family.name)
    torch.manual_seed(1)
    if family.auto_class.endswith("WithValueHead"):
        model: Any = AutoModelForCausalLMWithValueHead(plain, v_head_init_strategy="normal").eval()
        state, described = model.state_dict(), plain.config.to_dict()
    else:
        plain.config.num_labels = 1
        model = transformers.AutoModelForTokenClassification.from_config(plain.config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        state, described = model.state_dict(), plain.config.to_dict() | {"architectures": [type(model).__name__]}
    assert family_of_config(described, state).architecture == family.architecture
    assert family.architecture in (type(plain).__name__, type(model).__name__)
    native = family.native(described)
    state = {name: tensor for name, tensor in state.items() if name not in family.copies(native) and not family.reason_left_out(name)}
    converter = StateConverter(family.templates(native))
    built = NativeLM(native).eval()
    built.load_state_dict(converter.convert(state, family.bounds(native)))
    assert compare(model, built, family, native).error <= 1e-5
    back = converter.inverse().convert(built.state_dict(), family.bounds(native))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert family.refusal(native) is None


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
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings=False has no native counterpart"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("llama", {"logits_scaling": 8.0}, "sets logits_scaling=8.0, which is not known here; take it out if"),
        ("llama", {"final_logit_softcapping": 30.0}, "sets final_logit_softcapping=30.0"),
        ("olmo2", {"quantization_config": {"bits": 4}}, r"sets quantization_config=\{'bits': 4\}"),
        ("qwen3", {"pruned_heads": {"0": [1]}}, "sets pruned_heads"),
        ("llama", {"is_encoder_decoder": True}, "sets is_encoder_decoder=True"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type=yarn without factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 4}}, "rope_type=linear with beta_fast"),
        ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}}, "with mrope_section"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types names sliding layers, but use_sliding_window"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types names 1 layers where there are 3"),
        ("BiGS", {"mask_padding": False}, "mask_padding=False has no native counterpart"),
        ("BiGS", {"direction": "sideways"}, "sideways"),
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


# ---- fields that nobody reads

SIZES = {"gpt2": GPT2, "t5": T5, "BiGS": BIGS, "bert": BERT, "modernbert": BERT}
OTHER = {bool: lambda x: not x, int: lambda x: 2 * x + 2, float: lambda x: x + 0.5, str: lambda x: "relu", type(None): lambda x: 3}


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != OWN.name])
def test_every_field_of_the_config_class_changes_the_model_or_is_refused_or_known_to_do_nothing(kind: str) -> None:
    """Of the installed transformers: a field that a later version brings must be looked at before this passes."""
    family = FAMILIES[kind]
    plain = transformers.AutoConfig.for_model(kind, **SIZES.get(kind, LLAMA)).to_dict()
    before = effective(family.native(plain))
    ignored = set()
    for key, value in plain.items():
        other = OTHER.get(type(value), lambda x: {"odd": 1} if isinstance(x, dict) else ["odd"] * 7)(value)
        try:
            if effective(family.native(plain | {key: other})) == before:
                ignored.add(key)
        except (ConfigError, TypeError, ValueError):
            continue
    assert ignored <= HARMLESS | family.harmless | NO_INFLUENCE.get(kind, set()), ignored - HARMLESS - family.harmless


WINDOWS = {"max_window_layers", "sliding_window", "use_sliding_window"}
NO_INFLUENCE = {
    **{kind: {"max_position_embeddings"} for kind in ("llama", "mistral", "olmo2")},
    **{kind: {"max_position_embeddings", *WINDOWS} for kind in ("qwen2", "qwen3")},
    "modernbert": {"max_position_embeddings"},
    "t5": {"tie_word_embeddings", "feed_forward_proj"},  # where scale_decoder_outputs is said; relu is what it is
    "BiGS": {"convolution", "causal_form"},
}
"""Fields that are read, and that make no difference beside the others of the tested configuration."""


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != OWN.name])
def test_what_is_harmless_is_so_by_numbers(kind: str) -> None:
    """Harmless fields of a class, all changed at once: transformers computes the same."""
    family = FAMILIES[kind]
    plain = transformers.AutoConfig.for_model(kind, **SIZES.get(kind, LLAMA), pad_token_id=0).to_dict()
    keep = {"model_type", "architectures", "dtype", "transformers_version", "return_dict", "is_encoder_decoder", "id2label", "label2id"}
    keep |= {key for key, value in plain.items() if isinstance(value, list | dict) or key.endswith("_token_id")}
    keep |= {"output_attentions", "output_hidden_states", "problem_type", "pretraining_tp", "chunk_size_feed_forward"}
    keep |= {"dense_act_fn", "is_gated_act", "scaling", "decode", "pre_norm"}  # set by others; not of the class
    harmless = {key for key in plain if key in HARMLESS | family.harmless and key not in keep}
    changed = {key: OTHER[type(plain[key])](plain[key]) for key in harmless} | {k: 0.3 for k in harmless if "dropout" in k or "pdrop" in k}
    changed |= {"classifier_pooling": "mean"} if "classifier_pooling" in plain else {}
    for key in ("sparse_prediction", "summary_activation"):  # with labels alone; of a type of its own
        changed.pop(key, None)
    logits = []
    for fields in ({}, changed):
        config = transformers.AutoConfig.for_model(kind, **({k: v for k, v in plain.items() if k != "model_type"} | fields))
        model = getattr(transformers, family.auto_class).from_config(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            tokens = torch.randint(3, VOCAB, (2, 12), generator=generator)
            logits.append(model(tokens, **({"decoder_input_ids": tokens} if kind == "t5" else {})).logits)
    assert changed
    assert torch.equal(*logits), sorted(changed)


def test_the_tables_of_the_page_are_current() -> None:
    import conversion_table

    current = conversion_table.PAGE.read_text(encoding="utf-8")
    assert current == conversion_table.page(), "write them anew: python tests/conversion_table.py"
