"""The command line: what each command prints, what each mistake prints, exit codes, and what is not imported.

Commands run in this process through `main`; subprocesses are used where a clean `sys.modules` is the point.
"""

import importlib.machinery
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from heads_lightning.__main__ import main
from heads_lightning.commands import dispatch
from heads_lightning.registry import ConfigError, RunError

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "lightning", "mlflow", "transformers", "numpy", "liger_kernel")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Runs go to a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture
def trained(monkeypatch):
    """Replaces the train command, and the process of a sweep's cell, by ones that record what they are given."""
    from heads_lightning.composition import from_yaml
    from heads_lightning.sweeps import supervisor
    from heads_lightning.sweeps.ledger import Ledger, State

    calls = []

    def run_cell(sweep_dir, identity, *, warm, fail_fast):
        ledger = Ledger(sweep_dir)
        calls.append((from_yaml(ledger.config_file(identity)), sweep_dir / ledger[identity].folder))
        ledger.record(identity, State.done)

    monkeypatch.setattr(supervisor, "run_cell", run_cell)
    module = types.ModuleType("heads_lightning.commands.train")
    module.__spec__ = importlib.machinery.ModuleSpec("heads_lightning.commands.train", None)
    module.run = lambda config, run_dir: calls.append((config, run_dir)) or float(config.seed)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "heads_lightning.commands.train", module)
    return calls


def answer(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command line."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


# ------------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "trian": "there is no command 'trian'. Did you mean 'train'?",
    "objective=mlm": "`objective=mlm` comes after a command, e.g. heads-lightning train objective=mlm",
    "train objective=mln": "objective=mln does not exist. Did you mean objective=mlm? Available: causal, ",
    "train head.layer_norm=rms": "its options are chosen with a slash, head/layer_norm=rms or ",
    "train head/layer_norm=rmss": "head/layer_norm=rmss does not exist. Did you mean head/layer_norm=rms? Available: rms",
    "train hydra/sweeper=x": "hydra/sweeper=x does not exist. Available: grid, optuna",
    "train hydra=x": "hydra is no group. Groups: backbone, ",
    "train optimizer.betas={a:1}": "`optimizer.betas={a:1}` is not allowed: optimizer.betas takes a list of float, e.g. optimizer.betas=[",
    "train optimizer.learning_rate=inf": "optimizer.learning_rate=inf is out of range",
    "train seed=99999999999999999999": "seed=99999999999999999999 is out of range; use 0 to 4294967295",
    "train evaluation.infill_lines=-1": "evaluation.infill_lines=-1 is negative; use 0 or more",
    "train trainer.max_steps=9 trainer.profile_step=10": "trainer.profile_step=10 is after the last step; use 1 to trainer.max_steps=9",
    "train hydra.run.dir=": "`hydra.run.dir=` is empty (an unset variable of the shell?); write hydra.run.dir=VALUE, or leave it out",
    "train resume=": "`resume=` is empty (an unset variable of the shell?)",
    "train data=files data.root=": "`data.root=` is empty (an unset variable of the shell?)",
    "train experiment=null": "`experiment=null`: no recipe is taken unless one is given; leave it out",
    "train run_root=/proc/x data=files": "the run's folder /proc/x cannot be made (No such file or directory)",
    "evaluate checkpoint=": "`checkpoint=` is empty (an unset variable of the shell?); write checkpoint=VALUE",
    "evaluate runs/x": "Did you mean checkpoint=runs/x?",
    "new head class": "NAME=class cannot name a module",
    "train experiment=fim_prof": "experiment=fim_prof does not exist. Did you mean experiment=fim_proof?",
    "train objectiv=mlm": "objectiv does not exist. Did you mean objective?",
    "train objective.rat=1": "objective.rat does not exist. Did you mean objective.rate?",
    "train objective=causal objective.rate=1": "objective.rate belongs to objective=fim or objective=mlm",
    "train data.include=[a]": "data.include belongs to data=files",
    "train max_steps=3": "max_steps does not exist. Did you mean trainer.max_steps?",
    "train lr=3": "lr does not exist. Did you mean optimizer.learning_rate?",
    "train objective.max_steps=3": "objective.max_steps does not exist. Did you mean trainer.max_steps?",
    "train schedule=constant schedule.q=1": "schedule.q does not exist. schedule=constant has: warmup_fraction",
    "train +objective.foo=1": "`+objective.foo=1`: no new settings can be added, since nothing would read them. "
    "Values of your own go under extra: +extra.foo=1",
    "train ++trainer.maxsteps=1": "`++trainer.maxsteps=1`: no new settings can be added, since nothing would read them. "
    "Did you mean trainer.max_steps?",
    "train +seed=1": "`+seed=1`: seed exists already; write seed=1",
    "train +head=mlm": "`+head=mlm`: head exists already; write head=mlm",
    "train extra.foo=1": "extra.foo is new: values of your own are added with a plus, +extra.foo=1",
    "train ~head": "`~head`: nothing can be taken out",
    "train head@x=default": "`head@x=default`: options stay in their own group; write head=default",
    "train head=[default,mlm]": "`head=[default,mlm]`: head is chosen by name. Available: default, ",
    "train head=null": "`head=null`: head is chosen by name. Available: default, ",
    "train head.loss_implementation=fused": "`head.loss_implementation=fused` is not allowed: head.loss_implementation takes default, ",
    "train head.loss_implementation=fused_linera": "Did you mean head.loss_implementation=fused_linear?",
    "train seed=1e3": "`seed=1e3` is not allowed: seed takes a whole number; write seed=1000",
    "train data.sequence_length=long": "`data.sequence_length=long` is not allowed: data.sequence_length takes a whole number",
    "train trainer.max_steps=2k": "`trainer.max_steps=2k` is not allowed: trainer.max_steps takes a whole number or null; "
    "write trainer.max_steps=2000",
    "train trainer.compile=2": "`trainer.compile=2` is not allowed: trainer.compile takes true or false",
    "train seed=null": "`seed=null` is not allowed: seed takes a whole number",
    "train seed.x=1": "`seed.x=1`: seed holds a single value and has no fields of its own",
    "train optimizer.betas=0.9": "`optimizer.betas=0.9` is not allowed: optimizer.betas takes a list of float, e.g. optimizer.betas=[0.9]",
    "train name=a=b": "`name=a=b` cannot be read: quote a value that holds special characters, \"name='a=b'\"",
    "train optimizer.betas=(0.9,0.99)": "cannot be read: lists are written with brackets, optimizer.betas=[0.9,0.99]",
    "train seed": "`seed` has no value; write seed=VALUE",
    "train =3": "`=3` is not an override; write KEY=VALUE",
    "train seed=1,2": "`seed=1,2` gives several values: add -m to run each of them, or write seed=[1,2] for one list",
    "train objective=fim,mlm": "`objective=fim,mlm` gives several values: add -m to run each of them",
    "train name=${foo}": "`name=${foo}`: Interpolation key 'foo' not found",
    "train tokenizer=huggingface": "tokenizer.path is needed by tokenizer=huggingface: set tokenizer.path=VALUE. The file or folder.",
    "train objective.rate=2": "objective.rate=2.0 is out of range; objective=fim allows 0 to 1",
    "train head.name=normalized": "head.name=normalized does not fit the options of head=default; choose it with head=normalized",
    "train head.layer_norm.eps=1": "`head.layer_norm.eps=1`: head.layer_norm is null so far; choose it first, with head/layer_norm=rms",
    "train --config-dir=/nowhere": "--config-dir /nowhere is not a folder that can be read",
    "train --config-name=nosuch": "there is no configuration file nosuch.yaml in conf/ or in --config-dir",
    "train --config-path=x": "--config-path would hide the shipped configuration; add your own files with --config-dir FOLDER",
    "train --max-steps=3": "--max-steps is not a flag; settings are written trainer.max_steps=VALUE",
    "train --multirum": "--multirum is not a flag. Did you mean --multirun?",
    "train hydra/launcher=nosuch": "hydra/launcher=nosuch does not exist. Known: basic, joblib",
    "train --cfg job objective=mln": "objective=mln does not exist. Did you mean objective=mlm?",
    "train --cfg job objective.rat=1": "objective.rat does not exist. Did you mean objective.rate?",
    "train -m objective=mlm,mln": "objective=mln does not exist. Did you mean objective=mlm?",
    "train sweep.fail_fast=true": "`sweep.fail_fast=true` is for a sweep, and this is one run; add -m",
    "train -m seed=1,2 hydra/sweeper=basic": "hydra/sweeper=basic would train cells in one process",
    "train -m optimizer.learning_rate=interval(1e-4,1e-2)": "is no list of values; write A,B,C, or let hydra/sweeper=optuna choose",
    "train -m name=a,b": "two cells are the same experiment: name=a and name=b",
    "train -m seed=1,2 sweep.zip=[seed+name]": "sweep.zip=seed+name: name is not given several values",
    "train -m seed=1,2 sweep.zip=[seed]": "sweep.zip=[seed] pairs nothing",
    "train -m seed=1,2 sweep.filter=['seed>5']": "leaves none of the 2 cells",
    "train -m seed=1,2 sweep.filter=['sed>5']": "names sed, which is no setting of the cell. Did you mean 'seed'?",
    "train -m seed=1,2 sweep.trials=0": "sweep.trials=0 is out of range; use 1 or more",
    "train sweep.resume=/nowhere": "/nowhere is not the folder of a sweep",
    "runs run_root=nowhere": "run_root=nowhere is not a folder",
    "compare nowhere": "is no run folder and no MLflow run id",
    "train -m seed=1,x": "`seed=x` is not allowed: seed takes a whole number",
    "train head.tie_embeddings=true head.dtype=bfloat16": "head.tie_embeddings=true shares the backbone's float32 embedding",
    "train data.sequence_length=5": "data.sequence_length=5 is too short for objective=fim",
    "train data.sequence_length=2": "data.sequence_length=2 is out of range; data=stdlib allows 3 or more",
    "train name=a/b": "name='a/b' cannot name a folder",
    "train seed=-1": "seed=-1 is negative; use 0 or more",
    "config objective=mln": "objective=mln does not exist. Did you mean objective=mlm?",
    "config --jsn": "--jsn is not a flag of config",
    "list hed": "there is no group 'hed'. Did you mean 'head'?",
    "list head=normalised": "head=normalised does not exist. Did you mean head=normalized?",
    "list head.losses": "head.losses does not exist.",
    "schema hed": "schema takes one group. Did you mean 'head'?",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(line, capsys, tmp_path, trained):
    code, out, err = answer(capsys, *line.split(" "))
    assert code == 2
    assert err.startswith("heads-lightning: ")
    assert MISTAKES[line] in err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert out == ""
    assert not trained
    assert list(tmp_path.iterdir()) == []


LATE = [
    "train tracking.log_model=true objective=mlm head=mlm",
    "train data=files data.root=nowhere",
    "prepare data=jsonl data.root=nowhere",
]
"""What the parts alone do not show, and building or this machine does."""


@pytest.mark.parametrize("line", LATE)
@pytest.mark.parametrize("there", [[], ["runs", "runs/mlm-mlm-transformer", "runs/mlm-mlm-transformer/before"]])
def test_a_mistake_that_is_seen_late_leaves_nothing_either(line, there, capsys, tmp_path):
    for folder in there:
        (tmp_path / folder).mkdir()
    code, _, err = answer(capsys, *line.split(" "))
    assert (code, err.count("\n")) == (2, 1), err
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == there


def test_the_option_that_was_chosen_is_named(capsys):
    _, _, err = answer(capsys, "train", "objective=causal", "objective.rate=1")
    assert err.endswith("; you chose objective=causal\n")


def test_hydras_advice_to_append_is_never_given():
    for message in MISTAKES.values():
        assert "use +" not in message


def test_two_overrides_in_one_word(capsys):
    code, _, err = answer(capsys, "train", "objective=mlm head=mlm")
    assert code == 2
    assert "`objective=mlm head=mlm` is two overrides in one word; quote each by itself, or neither: objective=mlm head=…" in err


FILES = {
    "gr\xfc\xdfe: 1": "bad.yaml is not UTF-8",
    "seed: 3": "In experiment/bad.yaml: a recipe begins with the line `# @package _global_`",
    "": "In experiment/bad.yaml: a recipe begins with the line `# @package _global_`",
    "# @package _global_\ntrainer:\n\tmax_steps: 3": "is not YAML",
    "# @package _global_\nseed: 3\nseed: 4": "found duplicate key seed",
    "# @package _global_\ndefaults:\n  - override /objectiv: mlm": "In experiment/bad.yaml: objectiv is no group. Did you mean objective?",
}


@pytest.mark.parametrize("text", FILES)
def test_a_recipe_that_cannot_be_read_is_named(text, capsys, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "bad.yaml").write_text(text, encoding="latin-1")
    code, _, err = answer(capsys, "train", "--config-dir=mine", "experiment=bad")
    assert (code, err.count("\n")) == (2, 1), err
    assert FILES[text] in err
    assert "bad.yaml" in err


@pytest.mark.parametrize("text", ["[1, 2", "a: b: c", "- x"])
def test_a_broken_yaml_file_of_the_users_is_named(text, capsys, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "bad.yaml").write_text(f"# @package _global_\n{text}\n")
    code, _, err = answer(capsys, "train", "--config-dir=mine", "experiment=bad")
    assert code == 2
    assert "bad" in err
    assert err.count("\n") == 1


def test_a_mistake_in_a_users_file_names_the_file(capsys, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "typo.yaml").write_text("# @package _global_\ntrainer:\n  max_stps: 3\n")
    code, _, err = answer(capsys, "train", "--config-dir=mine", "experiment=typo")
    assert (code, err) == (
        2,
        "heads-lightning: In experiment/typo.yaml: trainer.max_stps does not exist. Did you mean trainer.max_steps?\n",
    )


def test_a_recipe_for_another_option_names_the_file_and_the_option(capsys, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "rates.yaml").write_text("# @package _global_\nobjective:\n  spm_rate: 1.0\n")
    code, _, err = answer(capsys, "train", "objective=causal", "--config-dir=mine", "experiment=rates")
    assert code == 2
    assert err.startswith("heads-lightning: In experiment/rates.yaml: objective.spm_rate belongs to objective=fim")


@pytest.mark.parametrize("more", [[], ["-m", "seed=1,2", "tracking=none"]])
def test_a_primary_file_of_the_users_is_checked_and_run(more, capsys, tmp_path, trained):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.yaml").write_text("defaults: [train, override /objective: mlm, _self_]\nname: mine\n")
    code, _, err = answer(capsys, "train", "--config-dir=mine", "--config-name=study", *more)
    assert code == 0, err
    assert {(config.name, config.objective.name) for config, _ in trained} == {("mine", "mlm")}
    code, _, err = answer(capsys, "train", "--config-dir=mine", "--config-name=study", "head.tie_embeddings=true", "head.dtype=bfloat16")
    assert code == 2
    assert "head.tie_embeddings=true shares" in err


def test_a_missing_gpu_is_said_before_the_run(capsys, monkeypatch, tmp_path, trained):
    monkeypatch.setattr("heads_lightning.composition.validation.available_gpus", lambda: 0)
    code, _, err = answer(capsys, "train", "head.loss_implementation=fused_linear")
    assert code == 2
    assert "needs a GPU and none is found; use head.loss_implementation=chunked or auto" in err
    assert list(tmp_path.iterdir()) == []


def test_the_user_may_ask_for_the_traceback(capsys, monkeypatch):
    monkeypatch.setattr("heads_lightning.__main__.USER_WANTS_TRACEBACK", True)
    code, _, err = answer(capsys, "train", "objective.rat=1")
    assert code == 2
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("heads-lightning: objective.rat does not exist.")


# ---------------------------------------------------------------------------------------------------------------- running


def test_train_runs_in_its_own_folder_without_hydras_files(capsys, tmp_path, trained):
    for _ in range(2):
        assert answer(capsys, "train", "objective=mlm", "head=mlm", "seed=3")[0] == 0
    (first, folder), (_, other) = trained
    assert (first.objective.name, first.head.name, first.seed, first.name) == ("mlm", "mlm", 3, "mlm-mlm-transformer")
    assert folder != other
    assert folder.parent == tmp_path / "runs" / "mlm-mlm-transformer"
    assert [p for p in (tmp_path / "runs").rglob("*") if p.is_file()] == []
    assert Path.cwd() == tmp_path


def test_a_sweep_runs_every_cell_in_one_folder(capsys, tmp_path, trained):
    code, _, err = answer(capsys, "train", "-m", "objective=causal,fim", "head.loss_implementation=default,chunked", "tracking=none")
    assert code == 0
    assert [(c.objective.name, str(c.head.loss_implementation)) for c, _ in trained] == [
        ("causal", "default"), ("causal", "chunked"), ("fim", "default"), ("fim", "chunked"),
    ]  # fmt: skip
    folders = [folder for _, folder in trained]
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    assert len({folder.parent for folder in folders}) == 1
    assert folders[0].parent.parent == tmp_path / "runs" / "sweeps"
    assert "Launching 4 jobs" in err


def test_a_mistake_during_the_run_is_one_line_too(capsys, monkeypatch, tmp_path, trained):
    def run(config, run_dir):
        raise ConfigError("data.root=x holds no files")

    monkeypatch.setattr(sys.modules["heads_lightning.commands.train"], "run", run)
    assert answer(capsys, "train") == (2, "", "heads-lightning: data.root=x holds no files\n")
    assert [p for p in tmp_path.rglob("*") if p.name.startswith("20")] == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("boom"), 1), (KeyboardInterrupt(), 130), (SystemExit(143), 143), (SystemExit("no"), 1), (RunError("why"), 1)],
)
def test_exit_codes(error, code, capsys, monkeypatch, trained):
    def run(config, run_dir):
        raise error

    monkeypatch.setattr(sys.modules["heads_lightning.commands.train"], "run", run)
    got, _, err = answer(capsys, "train")
    assert got == code
    assert "Error executing job" not in err  # Hydra's own words
    if isinstance(error, RunError):
        assert err == "heads-lightning: why\n"
    elif code == 1 and not isinstance(error, SystemExit):
        assert "RuntimeError: boom" in err
        assert "hydra/_internal" not in err


def test_sigterm_ends_with_143(tmp_path):
    script = "import os, signal, sys; from heads_lightning.commands import dispatch as d\n"
    script += "sys.exit(d.guarded(lambda: os.kill(os.getpid(), signal.SIGTERM) or 0, traceback=False))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 143


def test_hydras_environment_and_argv_are_put_back(capsys, monkeypatch, trained):
    before, seen = list(sys.argv), []

    def run(config, run_dir):
        seen.append((list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")))  # what a rank that the job starts would repeat

    monkeypatch.setattr(sys.modules["heads_lightning.commands.train"], "run", run)
    assert answer(capsys, "train")[0] == 0
    assert seen == [(before, None)]
    assert sys.argv == before
    assert "HYDRA_FULL_ERROR" not in os.environ


# -------------------------------------------------------------------------------------------------------- other commands


def test_help_of_the_program_and_of_each_command(capsys):
    code, out, _ = answer(capsys, "--help")
    assert code == 0
    for name, command in dispatch.available().items():
        assert f"  {name}" in out
        code, text, _ = answer(capsys, name, "--help")
        assert code == 0
        assert all(f"heads-lightning {example}" in text for example in command.examples)
        assert all(example.startswith(name) for example in command.examples)
    assert answer(capsys, "--version")[1].startswith("heads-lightning 0.")
    assert answer(capsys)[1] == out


def test_train_help_names_every_option(capsys):
    from heads_lightning.registry import Registry

    text = answer(capsys, "train", "--help")[1]
    for group, registry in Registry.groups.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {group} "))
        assert all(name in line for name in registry)


def test_cfg_prints_yaml_that_can_be_read(capsys):
    import yaml

    code, out, _ = answer(capsys, "train", "--cfg", "job", "objective=mlm")
    assert code == 0
    assert yaml.safe_load(out)["objective"]["name"] == "mlm"
    code, out, _ = answer(capsys, "train", "--cfg", "job", "--resolve", "--package", "trainer")
    assert "max_steps" in out
    assert "# @package trainer" in out


def test_info_and_hydra_help_are_hydras(capsys):
    assert answer(capsys, "train", "--hydra-help")[1].startswith("Hydra")
    assert answer(capsys, "train", "--info", "searchpath")[0] == 0


def test_list(capsys):
    everything = answer(capsys, "list")[1]
    for text in ("objective=", "fim_proof", "nGPT", "conf/backbone/tiny.yaml"):
        assert text in everything
    fields = answer(capsys, "list", "objective=fim")[1]
    assert re.search(r"objective\.rate +float +0\.5 +Share of pieces", fields)
    members = answer(capsys, "list", "head.loss_implementation")[1]
    assert re.search(r"fused_linear +Liger's Triton kernel; needs a GPU", members)
    described = json.loads(answer(capsys, "list", "head=default", "--json")[1])
    assert described["head.bias"]["type"] == "bool or null"
    assert "d_model: 128" in answer(capsys, "list", "backbone=tiny")[1]
    assert "evaluation.samples" in answer(capsys, "list", "evaluation")[1]


def test_config_says_where_values_come_from(capsys):
    values = json.loads(answer(capsys, "config", "experiment=fim_proof", "seed=3", "head=mlm", "head/layer_norm=rms", "--json")[1])
    wanted = {
        "seed": (3, "command line"), "head.name": ("mlm", "command line"), "head.layer_norm.name": ("rms", "command line"),
        "data.name": ("repeat", "experiment=fim_proof"), "objective.rate": (1.0, "conf/objective/fim_lines.yaml"),
        "backbone.d_model": (128, "conf/backbone/tiny.yaml"), "optimizer.name": ("muon", "conf/train.yaml"),
        "objective.level": ("context", "default"), "head.loss_implementation": ("auto", "shipped default"), "head.bias": (None, "default"),
    }  # fmt: skip
    assert {key: (values[key]["value"], values[key]["from"]) for key in wanted} == wanted


def test_config_diff(capsys):
    different = json.loads(answer(capsys, "config", "--diff", "seed=1", "objective=mlm", "--json")[1])
    assert different["seed"] == ["1", "0"]
    assert different["objective.name"] == ["fim", "mlm"]
    assert "tokenizer.name" not in different


def test_schema_knows_every_field(capsys):
    recipe = json.loads(answer(capsys, "schema")[1])
    assert recipe["additionalProperties"] is False
    assert "Share of" in recipe["properties"]["objective"]["properties"]["rate"]["description"]
    loss = json.loads(answer(capsys, "schema", "head")[1])["properties"]["loss_implementation"]["anyOf"]
    members = next(kind["enum"] for kind in loss if "enum" in kind)
    assert {"default", "chunked", "fused_linear", "auto"} <= set(members)


def test_completion(capsys, monkeypatch):
    def words(line: str) -> set[str]:
        monkeypatch.setenv("COMP_LINE", line)
        return set(answer(capsys, "-sc", "query=bash")[1].split())

    assert words("heads-lightning tr") >= {"train", "list"}
    assert words("heads-lightning train objective=") >= {"objective=causal", "objective=fim", "objective=mlm"}
    assert "head.loss_implementation=" in words("heads-lightning train head.lo")
    assert "objective" in words("heads-lightning list ")
    assert "heads-lightning" in answer(capsys, "-sc", "install=bash")[1].splitlines()[-1]


# ---------------------------------------------------------------------------------------------------- what is not imported

LIGHT = [
    "--help",
    "train --help",
    "train --cfg job",
    "train objective=mln",
    "generate checkpont=x -- a",
    "infill checkpont=x -- a b",
    "train objective.rat=1",
    "list",
    "config objective=mlm head=mlm",
]


@pytest.mark.parametrize("line", LIGHT)
def test_nothing_heavy_is_imported(line, tmp_path):
    script = (
        "import sys; from heads_lightning.__main__ import main; main(sys.argv[1:]);"
        f"print('HEAVY', sorted(m for m in sys.modules if m.split('.')[0] in {HEAVY!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script, *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "HEAVY []" in result.stdout, result.stdout[-500:] + result.stderr


def test_the_module_is_the_program(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "heads_lightning", "trian"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "Did you mean 'train'?" in result.stderr


# -------------------------------------------------------------------------------------------------- KEY=VALUE arguments


def test_key_value_arguments_are_read_with_the_same_care():
    from dataclasses import dataclass

    from omegaconf import MISSING

    from heads_lightning.commands.arguments import describe, read

    @dataclass
    class Arguments:
        checkpoint: str = MISSING
        """Run folder."""
        temperature: float = 1.0
        """Randomness."""
        seed: int | None = None
        """Seed."""
        quiet: bool = False
        """Say less."""

    got, free = read(Arguments, ["checkpoint=a=b", "--temperature=0.5", "quiet=true", "seed=null", "--", "x", "y=1"])
    assert (got, free) == (Arguments("a=b", 0.5, None, True), ["x", "y=1"])
    for words, message in {
        ("temprature=1",): "temprature does not exist. Did you mean temperature?",
        (): "checkpoint is needed: checkpoint=VALUE. ",
        ("checkpoint=a", "seed=1.5"): "`seed=1.5` is not allowed: seed takes a whole number or null",
        ("checkpoint=a", "quiet=2"): "quiet takes true or false",
        ("runs/x",): "`runs/x` is not an argument; write KEY=VALUE",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            read(Arguments, words)
    assert "checkpoint" in describe(Arguments)[1]
