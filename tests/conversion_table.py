"""The tables of experiments/conversion/README.md, from the registry of families and the cases that the tests convert.

python tests/conversion_table.py    # writes them anew
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversion_models import BERT, BIGS, CASES, GPT2, LLAMA, LLAMA3, T5, YARN, family_of_case

from heads_lightning.conversion.families import FAMILIES, OWN, with_values
from heads_lightning.registry import ConfigError

PAGE = Path(__file__).resolve().parents[1] / "experiments/conversion/README.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
SIZES: dict[str, dict[str, Any]] = {"gpt2": GPT2, "t5": T5, "BiGS": BIGS, "bert": BERT, "modernbert": BERT}
LOCAL = ["full_attention", "sliding_attention", "sliding_attention"]
SETTINGS: dict[str, dict[str, Any]] = {
    "tied embeddings": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "width of a head other than d/n": {"head_dim": 12, "d_kv": 12},
    "biases of attention": {"attention_bias": True},
    "biases of the feed-forward part": {"mlp_bias": True},
    "biases of norms": {"norm_bias": True},
    "base of rotary positions": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "linear stretch": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama3 stretch": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "dynamic, longrope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "partial rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "sliding windows": {"sliding_window": 8, "use_sliding_window": True, "layer_types": LOCAL},
    "another activation (relu)": dict.fromkeys(("hidden_act", "activation_function", "hidden_activation", "feed_forward_proj"), "relu"),
    "quick_gelu": dict.fromkeys(("hidden_act", "activation_function", "hidden_activation", "feed_forward_proj"), "quick_gelu"),
    "scores not scaled": {"scale_attn_weights": False},
    "scores scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "relative positions": {"position_embedding_type": "relative_key"},
    "soft cap, multipliers": {"final_logit_softcapping": 30.0, "residual_multiplier": 0.2},
    "quantised weights": {"quantization_config": {"bits": 4}},
}
EVERYWHERE = ("soft cap, multipliers", "quantised weights")


def tables() -> str:
    """Both, as Markdown."""
    return "\n\n".join((_families(), _settings()))


def _families() -> str:
    rows = [
        "| model_type | classes | import | export | validated by numbers, both ways, and to the bit |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, family in FAMILIES.items():
        cases = [case for case, (kind, _) in CASES.items() if kind == name]
        classes = dict.fromkeys([*(family_of_case(case).architecture for case in cases)] or [family.architecture])
        shown = ", ".join(cases) or "every backbone and head, in test_conversion.py and test_conversion_values.py"
        rows.append(f"| {name} | {', '.join(f'`{c}`' for c in classes)} | yes | yes | {shown} |")
    for family in with_values():
        both = family.auto_class.endswith("WithValueHead")
        layout, compared = ("`v_head` beside `lm_head`", "values, logits") if both else ("one label", "values")
        rows.append(f"| {family.name}, value head | `{family.architecture}`: {layout} | yes | yes | {compared} |")
    rows.append(f"| {OWN.name}, value head | `HeadsLightningForTokenClassification` | yes | yes | values |")
    return "\n".join(rows)


def _settings() -> str:
    names = [name for name in FAMILIES if name != OWN.name]
    rows = [f"| config.json says | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    return "\n".join([*rows, *(f"| {what} | {' | '.join(_said(name, what) for name in names)} |" for what in SETTINGS)])


def _said(name: str, what: str) -> str:
    """Maps, refused, or empty where the class has no such field."""
    import transformers

    known = transformers.AutoConfig.for_model(name).to_dict()
    fields = {key: value for key, value in SETTINGS[what].items() if key in known or what in EVERYWHERE}
    if name == "bert" and what == "relative positions":  # a field of earlier versions
        fields = SETTINGS[what]
    if not fields or (what == "sliding windows" and not {"sliding_window", "layer_types"} & fields.keys()):
        return ""
    try:
        FAMILIES[name].native({"model_type": name} | SIZES.get(name, LLAMA) | fields)
    except ConfigError:
        return "refused"
    return "maps"


def page() -> str:
    """The page with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
