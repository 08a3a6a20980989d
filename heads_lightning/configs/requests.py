"""What commands take that are not Hydra applications: `heads-lightning infill checkpoint=RUN …`."""

from dataclasses import dataclass
from enum import StrEnum

from heads_lightning.configs.devices import PEAK_TFLOPS
from heads_lightning.registry import ConfigError, nearest


@dataclass
class PlanRequest:
    """`heads-lightning check`: what the time of its plan assumes."""

    mfu: float = 0.4
    """Share of the devices' peak that the model's own operations reach, without what is computed twice (trainer.recompute_every)."""
    device: str | None = None
    """Device to plan for, e.g. H100. None: several, side by side."""
    peak_tflops: float | None = None
    """Operations of one device, in 10^12 a second, in place of a known device."""

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"mfu={self.mfu} is out of range; it is a share of the peak, e.g. mfu=0.4")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ConfigError(f"peak_tflops={self.peak_tflops} is out of range; it takes more than 0")
        if self.peak_tflops is not None and self.device is not None:
            raise ConfigError(f"device={self.device} and peak_tflops={self.peak_tflops} say the same thing twice; leave one out")
        if self.device is not None and self.device.upper() not in _KNOWN:
            raise ConfigError(
                f"device={self.device} is not known.{nearest(self.device.upper(), _KNOWN)} Known: {', '.join(PEAK_TFLOPS)}; "
                f"for another one give peak_tflops=N"
            )

    def peaks(self) -> dict[str, float]:
        """Operations a second of one device, by its name."""
        if self.peak_tflops is not None:
            return {f"a device of {self.peak_tflops:g} TFLOP/s": self.peak_tflops * 1e12}
        names = USUAL_DEVICES if self.device is None else (_KNOWN[self.device.upper()],)
        return {name: PEAK_TFLOPS[name] * 1e12 for name in names}


USUAL_DEVICES = ("A100", "H100", "B200")
"""Planned for when none is named."""
_KNOWN = {name.upper(): name for name in PEAK_TFLOPS}


@dataclass
class ModelRequest:
    """What every question to a trained model names."""

    checkpoint: str = "???"
    """Run folder (its newest checkpoint), checkpoint file, or MLflow run id."""
    run_root: str = "runs"
    """Folder that holds runs: where an MLflow run id is looked up."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps."""


@dataclass
class SamplingRequest(ModelRequest):
    """How tokens are drawn."""

    max_new_tokens: int = 100
    """Longest answer, in tokens. More than the default must be fewer than the positions of the model's training sequences."""
    temperature: float = 0.0
    """0: always the most likely token; higher: more varied."""
    top_k: int | None = None
    """Draw from the k most likely tokens. None: all."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability. None: all."""
    seed: int = 0
    """Seed of the draws."""
    json: bool = False
    """Print the answer as JSON (`--json` does too)."""
    steps: int | None = None
    """Masked diffusion: passes of the model over the max_new_tokens masks that it fills, all of them. None: one a token."""

    def __post_init__(self) -> None:
        for field, ok, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("steps", self.steps is None or self.steps >= 1, "1 or more, or null"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more, or null"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "more than 0, up to 1, or null"),
        ):
            if not ok:
                raise ConfigError(f"{field}={getattr(self, field)} is out of range; it takes {allowed}")


@dataclass
class GenerateRequest(SamplingRequest):
    """`heads-lightning generate`: continue a text. Also: text after `--`, or on standard input."""

    prompt: str | None = None
    """The text to continue."""
    prompt_file: str | None = None
    """A file that holds it."""


@dataclass
class InfillRequest(SamplingRequest):
    """`heads-lightning infill`: fill the hole between two texts. Also: `-- PREFIX SUFFIX`, or standard input with one <FILL>."""

    prefix_file: str | None = None
    """File that holds what stands before the hole."""
    suffix_file: str | None = None
    """File that holds what stands after it. None: nothing does."""
    layout: str | None = None
    """psm or spm. None: one that the model was trained on."""


@dataclass
class EvaluateRequest(ModelRequest):
    """`heads-lightning evaluate`: the held-out protocol on a trained model."""

    text_tokens: int | None = None
    """Held-out tokens scored left to right. None: as in the run's config."""
    infill_lines: int | None = None
    """Hidden lines. None: as in the run's config."""
    json: bool = False
    """Print the numbers as JSON alone (`--json` does too)."""
    save: bool = False
    """Write the numbers to the run's evaluation.json, where `compare` reads them."""
    problems: str | None = None
    """File of infilling problems (HumanEval-Infilling or SAFIM, .jsonl or .jsonl.gz) to score instead of the held-out text."""
    max_problems: int | None = None
    """Problems to score, evenly spread over the file. None: all."""
    execute: bool = False
    """Run the programs that the model completes, each in a process with limits, for pass@1. Model-written code may do anything that your
    user may; use a container for models that you do not trust. False: exact match alone."""


class ConvertTarget(StrEnum):
    """Which form a checkpoint gets."""

    huggingface = "huggingface"
    """A folder that transformers and inference servers open."""
    native = "native"
    """A folder that generate and evaluate read."""


@dataclass
class ConvertRequest:
    """`heads-lightning convert`: a checkpoint in the other form."""

    from_: str = "???"
    """Run folder, checkpoint file, MLflow run id, or a folder of Hugging Face or of an earlier conversion."""
    to: ConvertTarget = ConvertTarget.huggingface
    """The form wanted."""
    out: str = "???"
    """Folder to make; it appears when it is whole."""
    family: str | None = None
    """model_type to write. None: the first that expresses the model exactly, or our own."""
    dtype: str | None = None
    """float32, bfloat16 or float16. None: as stored."""
    vocab_size: int | None = None
    """Keep so many rows of a padded vocabulary. None: all."""
    validate: bool = True
    """Run both models and compare their logits."""
    shard_gb: float = 4.0
    """Gibibytes at which a new file is begun."""
    run_root: str = "runs"
    """Folder that holds runs: where an MLflow run id is looked up."""

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype={self.dtype} does not exist; available: float32, bfloat16, float16")
        if self.shard_gb <= 0:
            raise ConfigError(f"shard_gb={self.shard_gb} is out of range; it takes more than 0")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ConfigError(f"vocab_size={self.vocab_size} is out of range; it takes 1 or more, or null")


@dataclass
class CompareRequest:
    """`heads-lightning compare RUN RUN …`: what the held-out protocol found, side by side."""

    by: str | None = None
    """Measure to rank by. None: the first one that most runs have."""
    run_root: str = "runs"
    """Folder that holds runs: where an MLflow run id is looked up."""
    json: bool = False
    """Print JSON (`--json` does too)."""
    html: str | None = None
    """File to write the comparison to as a page that needs nothing else: table and learning curves."""
