"""Sharded training gives the weights and the losses of one process, whatever the objective, head and optimizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import OBJECTIVES, largest_difference, points, weights

from heads_lightning.composition import compose
from heads_lightning.configs.trainer import TrainerConfig
from heads_lightning.registry import ConfigError
from heads_lightning.run import train
from heads_lightning.training.checkpoints import checkpoint_path

FSDP = ["trainer.parallel=fsdp", "trainer.devices=2", "trainer.micro_batch_size=3"]
"""Two ranks, 4 sequences each in micro-batches of 3 and 1: unequal, with unequal numbers of targets."""
GRADIENT = ["optimizer=adamw", "optimizer.learning_rate=1.0", "optimizer.eps=1.0", "optimizer.weight_decay=0", "schedule=constant"]
"""An update that is the gradient to first order: weights equal to 1e-6 are gradients equal to 1e-6. (eps is far above them.)"""


def train_ranks(cases: dict[Path, list[str]], *, ranks: int = 2) -> None:
    """Train the cases in one job of several ranks."""
    listed = next(iter(cases)).parent / f"cases{ranks}.json"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(json.dumps({str(folder): overrides for folder, overrides in cases.items()}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = str(Path(__file__).with_name("parallel_ranks.py"))
    done = subprocess.run([*torchrun, script, str(listed)], timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def curve(run_dir: Path, name: str) -> list[float]:
    return [p[name] for p in points(run_dir) if name in p]


CLIPPED = ["optimizer.max_grad_norm=0.1", "data.validation_sequences=7", "trainer.max_steps=3"]
"""The norm is above 0.1 all the time; 7 held-out sequences leave the ranks 3 and 4, one batch and two of 3."""
MODELS = {
    "fim_middle": [*OBJECTIVES["fim_middle"], *GRADIENT, *CLIPPED],
    "mlm": [*OBJECTIVES["mlm"], *GRADIENT, *CLIPPED],
    "tied": ["objective=fim", "objective.rate=0.5", "head.tie_embeddings=true", *GRADIENT, *CLIPPED],
    "padded_t5": ["objective=span_corruption", "backbone=t5_tiny", "head=t5", "tokenizer.num_sentinels=20", *GRADIENT, *CLIPPED],
    "bigs": ["objective=mlm", "head=mlm", "backbone=bigs_tiny", *GRADIENT, *CLIPPED],
    "recomputed": ["objective=causal", "backbone=transformer", "trainer.recompute_every=1", *GRADIENT, *CLIPPED],
    "adamw_rms": ["objective=causal", "optimizer=adamw_rms", "optimizer.eps=1.0", *CLIPPED],
    "ngpt": ["objective=causal", "backbone=ngpt", "head=normalized", *GRADIENT, *CLIPPED],
}
MUON = ["objective=causal", "optimizer=muon", "optimizer.max_grad_norm=null", "trainer.max_steps=2", "trainer.micro_batch_size=4"]
"""Muon orthogonalises in bf16, which makes rounding large: compared where the gradients are the same to the bit, with two DDP ranks."""


TENSOR = ["trainer.parallel=tensor", "trainer.devices=2", "trainer.micro_batch_size=3"]
BERT = [
    "backbone.norm_placement=post",
    "backbone.norm=layer_norm",
    "backbone.bias=true",
    "backbone.embedding_norm=true",
    "backbone.token_types=2",
]
TENSOR_MODELS = {
    "tensor_fim": [*MODELS["fim_middle"], "head.z_loss_multiplier=1e-2", "head.label_smoothing=0.1", "tokenizer.vocab_size=511"],
    "tensor_bert": [*MODELS["mlm"], *BERT, "backbone.position=learned", "head.tie_embeddings=true", "trainer.recompute_every=1"],
    "tensor_olmo": [
        *["objective=causal", "head=normalized", "backbone.norm_placement=reordered", "backbone.qk_norm=true", *GRADIENT, *CLIPPED],
        *["backbone.num_heads=4", "backbone.num_kv_heads=2", "optimizer.average_decay=0.5"],
    ],
    "tensor_t5": MODELS["padded_t5"],
}
"""Between them every role of a module, a vocabulary that does not divide, and all that touches gradients or weights besides."""
MODELS |= TENSOR_MODELS


def of(model: str, tiny: list[str]) -> list[str]:
    fields = ["backbone.d_model", "backbone.num_layers", "backbone.num_heads"]
    sized = model in ("padded_t5", "bigs", "tensor_t5")  # these presets have sizes of their own
    return [o for o in tiny if not (sized and o.split("=")[0] in fields)] + MODELS[model]


@pytest.fixture(scope="module")
def sharded(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of two ranks, one for each model."""
    folder = tmp_path_factory.mktemp("sharded")
    cases = {folder / model: [*of(model, tiny), *(TENSOR if model in TENSOR_MODELS else FSDP)] for model in MODELS}
    # nothing to compare with, but copies of a weight must stay equal (parallel_ranks.py): ranks drop the same hidden states
    cases[folder / "dropout"] = [*of("tensor_t5", tiny), *TENSOR, "backbone.dropout=0.2"]
    cases[folder / "muon_tensor"] = [*tiny, *MUON, *TENSOR, "trainer.micro_batch_size=4"]
    for parallel in ("data", "fsdp"):
        cases[folder / f"muon_{parallel}"] = [*tiny, *FSDP, *MUON, f"trainer.parallel={parallel}"]
    for model in ("mlm", "bigs"):
        cases[folder / f"{model}_bfloat16"] = [*of(model, tiny), *FSDP, "trainer.gather_dtype=bfloat16", "trainer.reshard=false"]
    cases[folder / "bigs_kept_as_bfloat16"] = [*of("bigs", tiny), *FSDP, "trainer.precision=bf16-true"]
    train_ranks(cases)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("model", MODELS)
def test_sharded_ranks_give_the_weights_of_one_process(tiny: list[str], tmp_path: Path, sharded: Path, model: str) -> None:
    train(compose(of(model, tiny)), tmp_path / "one")
    assert largest_difference(weights(tmp_path / "one"), weights(sharded / model)) < 1e-6
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert curve(sharded / model, name) == pytest.approx(curve(tmp_path / "one", name), rel=1e-5)
    assert min(curve(tmp_path / "one", "train/grad_norm")) > 0.1


def matrix_differences(a: Path, b: Path) -> list[float]:
    first, other = weights(a), weights(b)
    return sorted(float((first[name] - other[name]).abs().max()) for name in first if first[name].ndim == 2)


@pytest.mark.distributed
def test_sharded_muon_makes_the_updates_of_whole_matrices(sharded: Path) -> None:
    """To the last bit of bf16 (2^-8 of an update of 1e-2 or two, in each of 2 steps) where rounding tips one, which few matrices see: a
    third step would start from weights that differ, and tip others.
    """
    differences = matrix_differences(sharded / "muon_data", sharded / "muon_fsdp")
    assert differences[len(differences) // 2] < 1e-6
    assert differences[-1] < 2 * 2e-2 * 2**-8


@pytest.mark.distributed
def test_muon_of_devices_that_compute_together_differs_as_another_cut_does(tiny: list[str], tmp_path: Path, sharded: Path) -> None:
    """Tensor parallelism adds in another order, and so does a smaller micro-batch: the same rounding, blown up by bf16 in the same way."""
    for micro in (8, 1):
        train(compose([*tiny, *MUON, f"trainer.micro_batch_size={micro}"]), tmp_path / str(micro))
    other_cut = matrix_differences(tmp_path / "8", tmp_path / "1")
    together = matrix_differences(tmp_path / "8", sharded / "muon_tensor")
    assert together[-1] < 2 * other_cut[-1] < 2e-3


@pytest.mark.distributed
@pytest.mark.parametrize(("model", "coarse"), [("mlm", "bfloat16"), ("bigs", "bfloat16"), ("bigs", "kept_as_bfloat16")])
def test_weights_gathered_as_bfloat16_cost_rounding_alone(sharded: Path, model: str, coarse: str) -> None:
    """Those of a state-space model are kept and gathered as they are: they would be another model's."""
    exact, rounded = (curve(sharded / name, "train/loss") for name in (model, f"{model}_{coarse}"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)  # bf16 keeps 8 bits


FOUR = ["trainer.devices=4", "trainer.micro_batch_size=3", "trainer.max_steps=2"]
GROUPS = ["trainer.parallel=fsdp_tensor", "trainer.tensor_size=2"]
OF_FOUR = {
    "fim_middle": ["trainer.parallel=hsdp", "trainer.shard_size=2", "evaluation.enabled=true"],
    "tensor_fim": [*GROUPS, "evaluation.enabled=true"],
    "tensor_bert": [*GROUPS, "trainer.offload=true"],
    "tensor_t5": GROUPS,
}
"""Two copies in halves; two groups of two, of which each reads 4 of 8 sequences, in micro-batches of 3 and 1."""


@pytest.fixture(scope="module")
def of_four(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of four ranks, one for each model."""
    folder = tmp_path_factory.mktemp("of_four")
    fim = [*of("tensor_fim", tiny), "trainer.checkpoint_every_steps=1", "trainer.max_steps=2"]
    train(compose(fim), folder / "one")
    cases = {folder / model: [*of(model, tiny), *FOUR, *layout] for model, layout in OF_FOUR.items()}
    cases[folder / "groups"] = [*fim, *FOUR, *GROUPS, "trainer.checkpoint_format=distributed"]
    cases[folder / "one_to_groups"] = [*fim, *FOUR, *GROUPS, f"resume={checkpoint_path(folder / 'one', 1)}"]
    train_ranks(cases, ranks=4)
    train(compose([*fim, f"resume={checkpoint_path(folder / 'groups', 1)}"]), folder / "groups_to_one")
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("model", OF_FOUR)
def test_groups_of_ranks_give_the_weights_of_one_process(tiny: list[str], tmp_path: Path, of_four: Path, model: str) -> None:
    """The first rank evaluates the whole model, of which it held a part."""
    train(compose([*of(model, tiny), "trainer.max_steps=2"]), tmp_path)
    assert largest_difference(weights(tmp_path), weights(of_four / model)) < 1e-6
    for name in ("train/loss", "train/grad_norm", "train/target_share", "val/loss"):
        assert curve(of_four / model, name) == pytest.approx(curve(tmp_path, name), rel=1e-5)
    assert (of_four / model / "evaluation.json").is_file() == ("evaluation.enabled=true" in OF_FOUR[model])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("other", ["groups", "one_to_groups", "groups_to_one"])
def test_a_checkpoint_goes_from_groups_to_one_process_and_back(of_four: Path, other: str) -> None:
    assert largest_difference(weights(of_four / "one"), weights(of_four / other)) < 1e-6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.num_heads=1"], r"backbone\.num_heads=1 cannot be shared evenly by the 2 devices of trainer\.parallel=tensor"),
        (["backbone.num_kv_heads=1"], r"backbone\.num_kv_heads=1 cannot be shared evenly"),
        (["data.sequence_length=65"], r"data\.sequence_length=65 cannot be shared evenly"),
        (["backbone.qk_norm=true", "backbone.qk_norm_width=full"], r"use backbone\.qk_norm_width=head, or trainer\.parallel=fsdp"),
        (["trainer.compile=true"], r"use trainer\.compile=false or trainer\.parallel=fsdp"),
        (["backbone=ngpt"], r"backbone=transformer or t5, not of backbone=ngpt; use trainer\.parallel=fsdp"),
        (["objective=value", "head=value", "objective.target=outcome"], r"head=value does not have; use trainer\.parallel=fsdp"),
    ],
)
def test_what_devices_cannot_share_is_refused_while_composing(tiny: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([*tiny, *TENSOR, *overrides])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel": "tensor"}, r"parallel=tensor needs several devices, not 1"),
        ({"parallel": "tensor", "devices": 4, "tensor_size": 2}, r"all 4 devices; leave it out, or use trainer\.parallel=fsdp_tensor"),
        ({"parallel": "fsdp_tensor", "devices": 6, "tensor_size": 4}, r"groups of 4 of 6 devices.*use trainer\.tensor_size=2 or 3"),
        ({"parallel": "fsdp_tensor", "devices": 2}, r"groups of 2 of 2 devices.*use trainer\.parallel=tensor"),
        ({"devices": 2, "tensor_size": 2}, r"tensor_size=2 belongs to trainer\.parallel=tensor or fsdp_tensor, not auto"),
        ({"devices": 2, "parallel": "tensor", "offload": True}, r"offload=True belongs to trainer\.parallel=fsdp or hsdp or fsdp_tensor"),
        ({"parallel": "fsdp_tensor", "devices": 6, "tensor_size": 2}, r"evenly by 3 groups of 2 devices; use a multiple of 3"),
        ({"parallel": "fsdp"}, r"parallel=fsdp needs several devices, not 1; use trainer\.devices=2 or trainer\.parallel=auto"),
        ({"parallel": "hsdp", "devices": 4, "shard_size": 3}, r"groups of 3 of 4 devices.*use trainer\.shard_size=2"),
        ({"parallel": "hsdp", "devices": 2}, r"groups of 2 of 2 devices.*use trainer\.parallel=fsdp"),
        ({"parallel": "fsdp", "devices": 2, "shard_size": 2}, r"shard_size=2 belongs to trainer\.parallel=hsdp"),
        ({"parallel": "fsdp", "devices": 2, "precision": "16-mixed"}, r"use trainer\.precision=bf16-mixed"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerConfig(max_steps=1, **fields)
