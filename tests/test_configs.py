"""Configurations: every option composes, saves and rebuilds; parts are checked together; plugins and users' files count as options."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore

from heads_lightning import compose
from heads_lightning.composition import config_hash, flatten, from_yaml, loaded_once, prepare_store, store_options, to_yaml, validate
from heads_lightning.composition.describe import documents, fields_of, group_options, groups, owners, summary
from heads_lightning.composition.store import conf_dir
from heads_lightning.composition.validation import _machine, available_gpus
from heads_lightning.configs.backbone import BackboneConfig, backbones
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.objective import CausalConfig, objectives
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.registry import ConfigError, Registry

ROOT = Path(__file__).resolve().parents[1]
SIZES = {f"num_{what}": 2 for what in ("hidden_layers", "attention_heads")} | {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 9}
SOURCE = tempfile.mkdtemp()
(Path(SOURCE) / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES))
NEEDED = {
    "tokenizer=huggingface": ["tokenizer.path=tokenizer.json"],
    "backbone=huggingface_import": [f"backbone.source={SOURCE}"],
    "data=huggingface": ["data.path=folder"],
    "objective=multi_token": ["head.steps_ahead=3"],
    "data=tokens": ["tokenizer=byte"],
    "backbone=huggingface": ["backbone.source=some/model"],
    "experiment=continue_fim": ["backbone.source=some/model"],
    "experiment=continue_mlm": ["backbone.source=some/model"],
    **{
        f"backbone=bigs_{size}": ["objective=mlm", "data.sequence_length=128"]
        for size in ("tiny", *(f"large_{2**n}" for n in (7, 9, 10, 12)))
    },
}
"""Overrides without which an option is not complete."""

prepare_store()
OPTIONS = [f"{group}={name}" for group in groups() for name in group_options(group)]


def fitting(option: str) -> list[str]:
    """Overrides that choose an option together with parts that fit it."""
    group, name = option.split("=")
    chosen = {group: name}
    cls = group_options(group)[name]
    if group == "backbone" and isinstance(cls, Path):  # a size of an option
        cls = backbones[yaml.safe_load(cls.read_text())["defaults"][0]]
    if isinstance(cls, type):
        if group == "objective":
            chosen["head"] = next(n for n, c in Registry.groups["head"].items() if c.predicts == cls.predicts)
            chosen["backbone"] = next(n for n, c in backbones.items() if cls.attention in c.supports)
        elif group == "head":
            chosen["objective"] = next(n for n, c in objectives.items() if c.predicts == cls.predicts)
        elif group == "backbone":
            given = cls().attention_supported()
            chosen["objective"] = next(n for n, c in objectives.items() if ({c.attention} | c.other_attention) & given)
    return [f"{g}={n}" for g, n in chosen.items()] + NEEDED.get(option, [])


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_and_file_composes_saves_and_rebuilds(option):
    config = compose(fitting(option))
    group, name = option.split("=")
    if isinstance(group_options(group)[name], type):
        assert getattr(config, group).name == name
    text = to_yaml(config)
    assert yaml.safe_load(text)["objective"]["name"] == config.objective.name
    again = from_yaml(text)
    assert again == config
    assert type(again.head) is type(config.head)
    assert config_hash(again) == config_hash(config)


def test_files_of_conf_hold_choices_only():
    for path in conf_dir().rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "_target_" not in text, path
        assert text.startswith("#"), f"{path} does not say what it is"


def test_every_field_and_option_is_documented():
    for group, registry in Registry.groups.items():
        for name, cls in registry.items():
            assert summary(cls), f"{group}={name} has no docstring"
            for field in fields_of(cls).values():
                assert field.doc or field.name == "name", f"{group}.{field.name} of {name} has no docstring"
    assert all(field.doc for field in fields_of(ExperimentConfig).values())


def test_a_run_starts_with_the_best_loss_and_a_library_call_with_the_plain_one():
    from heads_lightning import LMHeadConfig

    assert compose().head.loss_implementation == "auto"  # pyright: ignore[reportAttributeAccessIssue]
    assert LMHeadConfig().loss_implementation == "default"


def test_compose_can_be_repeated_and_nested():
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    assert compose(["seed=1"]) == compose(["seed=1"])
    assert not GlobalHydra.instance().is_initialized()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        compose(["objective=mlm"])
        assert GlobalHydra.instance().hydra is outer
        with pytest.raises(ConfigError):
            compose(["objective=mln"])
        assert GlobalHydra.instance().hydra is outer


def test_names_follow_the_parts_and_paths_the_run_root():
    config = compose(["objective=causal", "head=normalized", "run_root=elsewhere"])
    assert config.name == "causal-normalized-transformer"
    assert config.data.cache_dir == "elsewhere/data"
    assert compose(["name=mine"]).name == "mine"


def test_a_section_that_is_null_is_chosen_like_an_option():
    norm = compose(["head/layer_norm=layer_norm", "head.layer_norm.eps=1e-6"]).head.layer_norm  # pyright: ignore[reportAttributeAccessIssue]
    assert (norm.name, norm.eps) == ("layer_norm", 1e-6)
    assert compose().head.layer_norm is None  # pyright: ignore[reportAttributeAccessIssue]


def test_values_of_ones_own_go_under_extra():
    config = compose(["+extra.ticket=7", "+extra.tags=[a,b]"])
    assert config.extra == {"ticket": 7, "tags": ["a", "b"]}
    assert from_yaml(to_yaml(config)) == config


def test_users_files_are_options(tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "backbone" / "wide.yaml").write_text("defaults:\n  - transformer\nd_model: 512\n")
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /backbone: wide\nname: mine\n")
    config = compose(["experiment=mine"], config_dir=tmp_path)
    assert (config.backbone.d_model, config.name) == (512, "mine")
    with pytest.raises(ConfigError, match="Did you mean experiment=mine"):
        compose(["experiment=min"], config_dir=tmp_path)
    spaced = tmp_path / "with 'odd' name"
    (spaced / "experiment").mkdir(parents=True)
    (spaced / "experiment" / "odd.yaml").write_text("# @package _global_\nseed: 9\n")
    assert compose(["experiment=odd"], config_dir=spaced).seed == 9


def test_a_file_that_a_shipped_one_would_hide_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mlm.yaml"
    file.write_text("# @package _global_\nseed: 9\n")
    with pytest.raises(ConfigError, match=r"mlm\.yaml would not be read: a shipped file has its name, experiment/mlm\.yaml; rename it"):
        compose(["experiment=mlm"], config_dir=tmp_path)
    file.write_bytes((conf_dir() / "experiment" / "mlm.yaml").read_bytes())  # a copy of the shipped folder hides nothing
    assert compose(["experiment=mlm"], config_dir=tmp_path).objective.name == "mlm"


def test_what_is_loaded_once_composes_to_the_same():
    """Hydra writes into the trees that it is handed: a second composition must not see it."""
    given = [["experiment=mlm", "seed=3"], ["experiment=t5", "data.sequence_length=77"], ["experiment=mlm"], ["head=mlm", "objective=mlm"]]
    apart = [compose(overrides) for overrides in given]
    with loaded_once():
        assert [compose(overrides) for overrides in given] == apart


def test_what_was_loaded_is_kept_for_its_folder_and_no_longer_than_asked(tmp_path):
    def write(folder, seed):
        (tmp_path / folder / "experiment").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\nseed: {seed}\n")

    def seed_of(folder):
        return compose(["experiment=mine"], config_dir=tmp_path / folder).seed

    write("a", 1)
    write("b", 2)
    with loaded_once():
        assert (seed_of("a"), seed_of("b")) == (1, 2)
        write("a", 3)
        assert seed_of("a") == 1
    assert seed_of("a") == 3


def test_an_option_that_cannot_be_kept_is_loaded_again(monkeypatch):
    """A class made inside a function has no name to be unpickled by."""

    @dataclass
    class Unnamed(CausalConfig):
        name: str = "unnamed"

    monkeypatch.setitem(objectives._options, "unnamed", Unnamed)
    monkeypatch.setitem(ConfigStore.instance().repo["objective"], "unnamed.yaml", None)  # so that it is taken out again
    store_options()
    with loaded_once():
        assert [type(compose(["objective=unnamed"]).objective) for _ in range(2)] == [Unnamed, Unnamed]


# ------------------------------------------------------------------------------------------------------------ saved files


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("head.name", "normalised", "head=normalised does not exist"),
        ("head.los", 1, "head.los is not known to this version"),
        ("head.loss_implementation", "fused", "head.loss_implementation=fused does not exist"),
        ("seed", "one", "seed='one' is not of type int"),
        ("seed", True, "seed=True is not of type int"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate='fast' is not a number"),
        ("objective.rate", 2.0, "objective.rate=2.0 is out of range"),
        ("data.sequence_length", 5, "too short for objective=fim"),
        ("backbone", "transformer", "backbone='transformer' is not of type"),
    ],
)
def test_a_saved_file_that_does_not_fit_is_refused_by_name(path, value, message):
    tree = yaml.safe_load(to_yaml(compose()))
    *sections, last = path.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[last] = value
    with pytest.raises(ConfigError, match=message):
        from_yaml(yaml.safe_dump(tree))


def test_a_saved_file_may_leave_defaults_out_but_not_the_discriminator(tmp_path):
    tree = yaml.safe_load(to_yaml(compose()))
    tree["optimizer"] = {"name": "adamw", "learning_rate": "1e-4"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert from_yaml(file).optimizer.learning_rate == 1e-4
    del tree["optimizer"]["name"]
    with pytest.raises(ConfigError, match=r"optimizer\.name is missing"):
        from_yaml(yaml.safe_dump(tree))


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "!!python/object/apply:os.system ['true']"])
def test_what_is_no_saved_configuration_is_refused(text):
    with pytest.raises(ConfigError, match="saved configuration"):
        from_yaml(text)


def test_the_hash_ignores_where_a_run_lives_and_nothing_else():
    config = compose()
    assert config_hash(replace(config, run_root="x", name="y", resume="z")) == config_hash(config)
    assert config_hash(compose(["run_root=elsewhere"])) == config_hash(config)
    assert config_hash(compose(["seed=1"])) != config_hash(config)
    assert config_hash(compose(["trainer.linear_kernel=torch"])) != config_hash(config)  # two cells of a sweep over it are two
    assert config_hash(compose(["objective.rate=0.4"])) != config_hash(config)


def test_flatten_gives_text_for_every_value():
    flat = flatten(compose(["+extra.a={b: 1}"]))
    assert flat["objective.name"] == "fim"
    assert flat["head.bias"] == "null"
    assert flat["trainer.compile"] == "false"
    assert flat["optimizer.betas"] == "[0.9, 0.95]"
    assert flat["extra.a.b"] == "1"
    assert all(isinstance(value, str) for value in flat.values())


# ---------------------------------------------------------------------------------------------------------- parts together


def test_every_pair_of_objective_backbone_and_head_composes_or_is_refused_in_a_sentence():
    base = compose()
    for objective in objectives:
        for backbone in backbones:
            for head, head_class in Registry.groups["head"].items():
                parts = {"objective": objectives[objective](), "backbone": backbones[backbone](), "head": head_class()}
                config = replace(base, **parts)
                fits = (
                    config.objective.attention in config.backbone.attention_supported()
                    and config.objective.predicts == head_class.predicts
                    and not getattr(config.objective, "steps_ahead", 0)  # heads predict one step unless told otherwise
                )
                if fits:
                    validate(config)
                else:
                    with pytest.raises(ConfigError, match=r"; use .*=") as refusal:
                        validate(config)
                    assert "\n" not in str(refusal.value), (objective, backbone, head)


def test_a_backbone_that_cannot_see_what_the_objective_needs_is_refused():
    class CausalOnly(TransformerConfig):
        def attention_supported(self):
            return frozenset(list(self.supports)[:0])

    with pytest.raises(
        ConfigError, match=r"objective=fim needs causal attention, which backbone=transformer does not give .*backbone=ngpt"
    ):
        validate(replace(compose(), backbone=CausalOnly()))


def test_a_head_for_another_prediction_is_refused():
    config = compose()
    valued = type("Valued", (type(config.head),), {"predicts": "value"})()
    with pytest.raises(ConfigError, match=r"objective=fim predicts a token, but head=default scores a value; use head=default"):
        validate(replace(config, head=valued))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.position=learned", "backbone.max_positions=128"], "backbone.max_positions=256 or backbone.position=rotary"),
        (["tokenizer.vocab_size=300"], "tokenizer.vocab_size=300 is out of range"),
        (["trainer.global_batch_size=7", "trainer.devices=2"], "use a multiple of 2"),
        (["trainer.max_steps=null"], "give one of them"),
        (["head=normalized", "head.tie_embeddings=true"], "use head=default"),
        (["run_root=''"], "run_root is empty"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_what_is_unusual_but_right_is_allowed():
    compose(["trainer.micro_batch_size=64", "trainer.global_batch_size=32"])
    compose(["head=normalized", "backbone=transformer"])
    compose(["backbone.position=rotary", "backbone.max_positions=8"])


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        (["head.loss_implementation=fused_linear"], 0, "needs a GPU and none is found"),
        (["head.loss_implementation=fused_linear", "trainer.accelerator=cpu"], 1, "trainer.accelerator=cpu does not use it"),
        (["head.loss_implementation=fused_linear"], 1, None),
        (["head.loss_implementation=chunked"], 0, None),
        (["trainer.accelerator=gpu"], 0, "no GPU is found"),
        (["trainer.devices=4"], 2, "use trainer.devices=2"),
        (["trainer.devices=4"], 0, None),
        (["trainer.devices=4", "trainer.accelerator=cpu"], 2, None),
        (["trainer.precision=16-mixed"], 0, "use trainer.precision=bf16-mixed"),
    ],
)
def test_what_this_machine_cannot_do_is_said(overrides, gpus, message):
    problems = list(_machine(compose(overrides), gpus=gpus))
    assert (not problems) if message is None else (message in problems[0])


def test_hidden_gpus_do_not_count(monkeypatch):
    monkeypatch.setattr("heads_lightning.composition.validation._loads", lambda library: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert available_gpus() == 2
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert available_gpus() == 0


# ------------------------------------------------------------------------------------------------------------------ plugins

PLUGIN = '''
from dataclasses import dataclass
from heads_lightning.configs.head import DefaultLMHeadConfig, heads

@heads.register("{name}")
@dataclass
class Shiny(DefaultLMHeadConfig):
    """A head from elsewhere."""
    name: str = "{name}"
    shine: float = 1.0
    """How much."""
'''


def with_plugin(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in its own process with a plugin module."""
    (folder / "shiny_plugin.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "HEADS_LIGHTNING_PLUGINS": "shiny_plugin"}
    command = [sys.executable, "-m", "heads_lightning", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_plugin_is_an_option_like_any_other(tmp_path):
    listed = with_plugin(tmp_path, PLUGIN.format(name="shiny"), "list", "head")
    assert "A head from elsewhere." in listed.stdout
    assert "plugin shiny_plugin (HEADS_LIGHTNING_PLUGINS)" in listed.stdout
    composed = with_plugin(tmp_path, PLUGIN.format(name="shiny"), "train", "--cfg", "job", "head=shiny", "head.shine=2")
    head = yaml.safe_load(composed.stdout)["head"]
    assert (head["name"], head["shine"], head["loss_implementation"]) == ("shiny", 2.0, "auto")
    near = with_plugin(tmp_path, PLUGIN.format(name="shiny"), "train", "head=shiney")
    assert "Did you mean head=shiny?" in near.stderr


def test_a_taken_name_raises_with_both_places(tmp_path):
    result = with_plugin(tmp_path, PLUGIN.format(name="default"), "list", "head")
    assert result.returncode == 2
    assert "head=default is registered twice" in result.stderr
    assert "configs/head.py" in result.stderr
    assert "shiny_plugin.py" in result.stderr


def test_a_plugin_that_does_not_import_is_named_and_the_rest_works(tmp_path):
    result = with_plugin(tmp_path, "import nosuchmodule", "list", "head")
    assert result.returncode == 0
    assert "normalized" in result.stdout
    assert result.stderr.strip() == (
        "heads-lightning: warning: plugin 'shiny_plugin' (HEADS_LIGHTNING_PLUGINS) failed to import: "
        "ModuleNotFoundError: No module named 'nosuchmodule'"
    )


# ---------------------------------------------------------------------------------------------------------------- describe


def test_descriptions_are_inherited():
    assert fields_of(TransformerConfig)["d_model"].doc == "Width of the hidden states."
    assert documents(BackboneConfig)["d_model"] == "Width of the hidden states."
    assert owners("objective", "rate")[:2] == ["fim", "mlm"]


def test_num_params_of_configs_needs_no_torch():
    for name, cls in backbones.items():
        if not name.startswith("huggingface"):  # what they build is described elsewhere
            assert is_dataclass(cls)
            assert cls().num_params(100) > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=multi_token"], r"predicts 3 steps beyond the next token, the head 0; use head\.steps_ahead=3"),
        (["head.steps_ahead=2"], r"predicts 0 steps beyond the next token, the head 2; use head\.steps_ahead=0"),
        (["objective=multi_token", "head=normalized", "backbone=ngpt"], r"use head=default head\.steps_ahead=3"),
        (["data=tokens"], r"would be trained on text; use the tokenizer that made them"),
        (
            ["objective=mixture", "objective.parts={a: {name: causal, mode: true}}", "tokenizer.num_sentinels=0"],
            r"wants 1 mode tokens, .* use tokenizer\.num_sentinels=1",
        ),
        (["data.length_start=4", "data.length_warmup_steps=9"], r"data\.length_start=4 is too short for objective=fim"),
        (["objective=mixture", "objective.parts={a: {name: multi_token}}"], r"use objective=multi_token"),
    ],
)
def test_parts_that_need_each_other_are_refused_apart(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_parts_of_a_mixture_replace_the_default_ones():
    config = compose(["objective=mixture", "objective.parts={a: {name: causal}, b: {name: fim, weight: 3}}"])
    assert config.objective.parts == {"a": {"name": "causal"}, "b": {"name": "fim", "weight": 3}}  # pyright: ignore[reportAttributeAccessIssue]
    assert set(compose(["objective=mixture"]).objective.parts) == {"left_to_right", "fim"}  # pyright: ignore[reportAttributeAccessIssue]
