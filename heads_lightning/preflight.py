"""Trying an experiment out before it costs anything: what `heads-lightning check` does.

Each probe is a function that returns what it saw, or raises AssertionError with the promise that is broken. Choices: real examples of the
real data, a model of the same options at toy size (so that a 7 B configuration is probed in seconds on a login node), and no probe that
cannot fail: those that look for a leak have a control that must be caught.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from heads_lightning.batch import IGNORE, PADDING, Attention, Batch, Examples
from heads_lightning.composition import machine_problems
from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.head import LMHeadConfig
from heads_lightning.configs.requests import PlanRequest
from heads_lightning.data.stream import rows_of
from heads_lightning.experiment import Experiment, build, build_model
from heads_lightning.planning import Plan, plan
from heads_lightning.registry import ConfigError
from heads_lightning.testing import check_head
from heads_lightning.testing.backbones import check_encoder_decoder, check_isolation, check_sight, enlarged
from heads_lightning.testing.leaks import check_leaks
from heads_lightning.training.agreement import settled

TOY = {"d_model": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "feed_forward_dim": 128, "intermediate_size": 128, "num_ssm": 16}
"""Sizes of a toy model: of the fields that a backbone has, those that are larger."""
ROWS, LONGEST = 4, 256
"""Examples that the toy model is trained on, and their length at most."""
OVERFIT_STEPS, OVERFIT_SHARE = 80, 0.6
"""Steps on one batch, and the share of the first loss below which they must bring it."""
FIRST_LOSS = 0.1
"""How far from ln V, as a share of it, the loss of a model that has learned nothing may be."""


class Row(NamedTuple):
    """The verdict on one question."""

    name: str
    verdict: str
    """ok, failed, or skipped."""
    text: str
    """What was seen, or why not."""
    seconds: float
    numbers: dict[str, Any]
    """The same for programs, where it is more than a verdict."""


class Seen(NamedTuple):
    """What a probe saw that has numbers to show."""

    text: str
    numbers: dict[str, Any]


class Skipped(Exception):
    """A probe that does not apply; the message says why."""


def preflight(
    config: ExperimentConfig, *, assumed: PlanRequest | None = None, say: Callable[[str], None] = lambda line: None
) -> Iterator[Row]:
    """Every probe of a composed experiment, in order, as it is done. A probe whose experiment cannot be built is the last."""
    probes = Probes(config, say, assumed)
    for name, probe in probes.named():
        started, numbers = time.perf_counter(), {}
        try:
            verdict, seen = "ok", probe()
            text, numbers = seen if isinstance(seen, Seen) else (seen, {})
        except Skipped as reason:
            verdict, text = "skipped", str(reason)
        except (AssertionError, ConfigError) as problem:
            verdict, text = "failed", " ".join(str(problem).split())
        yield Row(name, verdict, text, time.perf_counter() - started, numbers)
        if verdict == "failed" and name == "data":
            return  # nothing further can be built


class Probes:
    """The probes of one experiment, and what they share, made when it is first asked for."""

    def __init__(self, config: ExperimentConfig, say: Callable[[str], None], assumed: PlanRequest | None = None) -> None:
        self.assumed = assumed or PlanRequest()
        self.config = replace(config, trainer=settled(config.trainer))
        self._say = say

    def named(self) -> list[tuple[str, Callable[[], str | Seen]]]:
        """(question, probe)."""
        return [
            ("machine", self.machine),
            ("data", self.data),
            ("vocabulary", self.vocabulary),
            ("labels", self.labels),
            ("plan", self.plan),
            ("first loss", self.first_loss),
            ("gradients", self.gradients),
            ("one batch", self.one_batch),
            ("sight", self.sight),
            ("packing", self.packing),
            ("head and loss", self.head_and_loss),
        ]

    # ------------------------------------------------------------------------------------------------------ shared

    @cached_property
    def experiment(self) -> Experiment:
        return build(replace(self.config, backbone=toy(self.config.backbone)), say=self._say)

    @cached_property
    def examples(self) -> Examples:
        """Rows of the training stream, as training would see them."""
        count = min(64, self.config.trainer.global_batch_size)
        return self.experiment.datamodule.train_stream.examples(0, count)

    @cached_property
    def batch(self) -> Batch:
        """A few rows for the toy model."""
        return Batch.from_examples(_shortened(rows_of(self.examples, 0, ROWS), LONGEST), self.experiment.objective.attention)

    def _toy_model(self) -> tuple[Any, Any]:
        return build_model(self.experiment.config, self.experiment.prepared.tokenizer.vocabulary.size)

    def _loss(self, backbone: Any, head: Any) -> torch.Tensor:
        return head.loss(backbone(self.batch), self.batch, divisor=float(max(self.batch.num_targets, 1))).loss

    # ------------------------------------------------------------------------------------------------------ probes

    def machine(self) -> str:
        """What the config asks for is here."""
        for problem in machine_problems(self.config):
            raise ConfigError(problem)
        trainer = self.config.trainer
        return f"{trainer.world_size} device(s), {trainer.arithmetic}"

    def data(self) -> str:
        """What training reads, and how much of it teaches."""
        prepared, made = self.experiment.prepared, self.examples
        counted = (made.labels_BS != IGNORE).mean()
        padding = 0.0 if made.segments_BS is None else (made.segments_BS == PADDING).mean()
        assert counted > 0, "no position of the first batch has a target"
        return (
            f"{prepared.train.tokens:,} training and {prepared.validation.tokens:,} held-out tokens; {counted:.1%} of positions have a "
            f"target, {padding:.1%} are padding; {_documents(made):.1f} pieces a row"
        )

    def vocabulary(self) -> str:
        """Tokenizer, special tokens, ids and model agree."""
        vocabulary = self.experiment.prepared.tokenizer.vocabulary
        highest = max(int(self.examples.tokens_BS.max()), int(self.examples.labels_BS.max()))
        assert highest < vocabulary.size, f"id {highest} is outside the vocabulary of {vocabulary.size}"
        rows = self.experiment.module.backbone.embedding.num_embeddings
        assert rows >= vocabulary.size, f"an embedding of {rows} rows for {vocabulary.size} tokens"
        roles = [role for role in self.config.objective.special_tokens if getattr(vocabulary, role) in (None, ())]
        assert not roles, f"the tokenizer lacks {', '.join(roles)}"
        return f"{vocabulary.size:,} tokens, {', '.join(self.config.objective.special_tokens) or 'no special tokens needed'}"

    def labels(self) -> str:
        """A causal model predicts the next token; no other is shown what it is to predict."""
        made, attention = self.examples, self.experiment.objective.attention
        if self.config.objective.predicts != "token" or attention == Attention.encoder_decoder:
            raise Skipped(f"objective={self.config.objective.name} does not predict tokens of its own input")
        has = made.labels_BS != IGNORE
        same = _share(made.tokens_BS == made.labels_BS, has)
        if attention == Attention.bidirectional:
            assert same < 0.5, f"{same:.0%} of the targets stand in plain sight at their own position"
            return f"{same:.1%} of the targets are visible at their own position (kept tokens)"
        following = _follows(made) & has[:, :-1]
        if made.prefix_BS is not None:
            following &= ~made.prefix_BS[:, :-1]
        shifted = _share(made.tokens_BS[:, 1:] == made.labels_BS[:, :-1], following)
        assert shifted == 1, f"only {shifted:.1%} of the targets are the token that follows"
        return f"every target is the token that follows ({same:.1%} repeat the token before them)"

    def plan(self) -> Seen:
        """Costs of the real model, and the time that they take."""
        made, devices, mfu = self.cost(), self.config.trainer.world_size, self.assumed.mfu
        seconds = {name: made.seconds(peak * mfu * devices) for name, peak in self.assumed.peaks().items()}
        times = [{"device": name, "seconds": spent, "device_hours": spent * devices / 3600} for name, spent in seconds.items()]
        return Seen(self._costs(made, seconds), made.numbers() | {"mfu": mfu, "devices": devices, "times": times})

    def _costs(self, made: Plan, seconds: dict[str, float]) -> str:
        """A plan in words."""
        parameters, memory = sum(made.parameters.values()), made.memory
        parts = ", ".join(f"{name.removeprefix('backbone.')} {_count(number)}" for name, number in made.parameters.items())
        bytes_ = ", ".join(f"{name} {_size(number)}" for name, number in memory._asdict().items() if number)
        devices = self.config.trainer.world_size
        hours = ", ".join(f"{name} {_time(spent)} ({spent * devices / 3600:.3g} device hours)" for name, spent in seconds.items())
        return (
            f"{_count(parameters)} parameters ({parts}); {made.flops_per_token:.2e} FLOPs a token; "
            f"{_size(memory.total)} a device ({bytes_}); {_positions(self.config, made)}, {made.steps:,} steps, "
            f"{made.passes:.2g} passes; {made.flops:.1e} FLOPs, at an MFU of {self.assumed.mfu:.0%} on {devices} device(s): {hours}"
        )

    def cost(self) -> Plan:
        """The plan as numbers."""
        prepared = self.experiment.prepared
        return plan(
            self.config,
            vocab_size=prepared.tokenizer.vocabulary.size,
            training_tokens=prepared.train.tokens,
            sample=self.examples,
            attention=self.experiment.objective.attention,
            precision=self.config.trainer.precision,
        )

    def first_loss(self) -> str:
        """A model that has learned nothing guesses."""
        if not isinstance(self.config.head, LMHeadConfig):
            raise Skipped("the loss is not over a vocabulary")
        backbone, head = self._toy_model()
        with torch.no_grad():
            losses = head.loss(backbone.eval()(self.batch), self.batch, divisor=None).loss
        loss = float(losses.sum()) / max(int((self.batch.labels_BS != IGNORE).sum()), 1)
        guess = math.log(self.experiment.prepared.tokenizer.vocabulary.size)
        assert abs(loss - guess) <= FIRST_LOSS * guess, f"{loss:.2f} nats before training; guessing is ln V = {guess:.2f}"
        return f"{loss:.2f} nats before training; guessing is ln V = {guess:.2f}"

    def gradients(self) -> str:
        """Every parameter learns from the first batch."""
        backbone, head = self._toy_model()
        torch.manual_seed(self.config.seed)  # dropout
        self._loss(backbone.train(), head.train()).backward()
        named = [*backbone.named_parameters(prefix="backbone"), *head.named_parameters(prefix="head")]
        trained = [(name, p.grad) for name, p in named if p.requires_grad]
        without = [name for name, grad in trained if grad is None]
        assert not without, f"no gradient reaches {', '.join(without)}"
        broken = [name for name, grad in trained if grad is not None and not grad.isfinite().all()]
        assert not broken, f"the gradient of {', '.join(broken)} is not finite"
        zero = [name for name, grad in trained if grad is not None and not grad.any()]
        return f"finite at all {len(trained)} tensors" + (f"; 0 so far at {', '.join(zero[:4])}" if zero else "")

    def one_batch(self) -> str:
        """The toy model can learn one batch by heart."""
        backbone, head = self._toy_model()
        parameters = [p for p in (*backbone.parameters(), *head.parameters()) if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
        torch.manual_seed(self.config.seed)
        losses = []
        for _ in range(OVERFIT_STEPS):
            loss = self._loss(backbone.train(), head.train())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            backbone.after_optimizer_step()
            head.after_optimizer_step()
            losses.append(float(loss.detach()))
        said = f"{OVERFIT_STEPS} steps on one batch bring the loss from {losses[0]:.2f} to {losses[-1]:.2f}"
        assert losses[-1] < OVERFIT_SHARE * losses[0], f"{said}; less than {OVERFIT_SHARE:.0%} of the first was due"
        return said

    def sight(self) -> str:
        """A position sees what the objective allows, and nothing else."""
        attention, small = self.experiment.objective.attention, toy(self.config.backbone)
        if attention == Attention.causal:
            return check_leaks(small, steps=0)
        if attention == Attention.encoder_decoder:
            check_encoder_decoder(enlarged(small))
            return "the decoder sees the encoder and what it has written, of its own segment; nothing else"
        check_sight(enlarged(small), attention)
        return f"{attention}: each position sees what it should, and nothing else"

    def packing(self) -> str:
        """Packed documents and padding change nothing of each other."""
        attention = self.experiment.objective.attention
        if attention == Attention.encoder_decoder:
            raise Skipped("part of `sight` for encoder-decoders")
        check_isolation(enlarged(toy(self.config.backbone)), attention)
        return "packed documents do not see each other; padding on either side changes nothing"

    def head_and_loss(self) -> str:
        """The head with every loss implementation that runs here against a definition in fp64, gradients included."""
        if not isinstance(self.config.head, LMHeadConfig):
            raise Skipped(f"head={self.config.head.name} has no projection over a vocabulary")
        check_head(self.config.head)
        return f"head={self.config.head.name} equals its definition with every loss implementation that runs here"


def toy(config: BackboneConfig) -> BackboneConfig:
    """The same options at toy size; where the sizes do not fit each other, the config itself."""
    smaller: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in TOY and isinstance(value, int) and value > TOY[field.name]:
            smaller[field.name] = TOY[field.name]
    if isinstance(getattr(config, "head_dim", None), int):
        smaller["head_dim"] = 16
    try:
        return replace(config, **smaller)
    except ConfigError:
        return config


def _shortened(made: Examples, longest: int) -> Examples:
    """The first positions of every row; the head's parts of a batch that are per row stay as they are."""
    if made.tokens_BS.shape[1] <= longest or made.counts_B is not None:
        return made
    wide = {name: array for name, array in made._asdict().items() if array is not None and array.ndim == 2}
    return made._replace(**{name: np.ascontiguousarray(array[:, :longest]) for name, array in wide.items()})


def _follows(made: Examples) -> np.ndarray:
    """bool [B, S-1]: the next position is of the same piece."""
    if made.segments_BS is None:
        return np.ones((made.tokens_BS.shape[0], made.tokens_BS.shape[1] - 1), bool)
    return (made.segments_BS[:, 1:] == made.segments_BS[:, :-1]) & (made.segments_BS[:, 1:] != PADDING)


def _share(true: np.ndarray, among: np.ndarray) -> float:
    return float((true & among).sum() / max(among.sum(), 1))


def _documents(made: Examples) -> float:
    if made.segments_BS is None:
        return 1.0
    return float(np.mean([len(np.unique(row[row != PADDING])) for row in made.segments_BS]))


def _positions(config: ExperimentConfig, made: Plan) -> str:
    sizes = config.trainer.batch_sizes(config.data.sequence_length)
    first = "" if sizes.start == sizes.full else f" ({sizes.tokens(1):,} in the first)"
    return f"{made.tokens_per_step:,} positions a step{first}"


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
