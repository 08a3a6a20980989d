"""Prepared data to Lightning: a loader of optimizer steps, and a fixed one for validation.

Choices. Step t of the optimizer reads samples t*G … t*G + G - 1 (G = global batch size; where it grows, those that follow the steps
before); of each step every rank makes its own fixed share at once and cuts it into micro-batches. So every micro-batch knows how many
targets the share has, the position in the data is a number, resuming is a multiplication, and neither the number of ranks nor the
micro-batch size changes what a step is trained on. One thread makes the next step's share while this one is used. There are no worker
processes: reading and transforming runs at tens of millions of tokens a second in this process, and handing arrays over from another costs
more than making them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch

from heads_lightning.batch import IGNORE, Batch, Examples
from heads_lightning.configs.batch_sizes import BatchSizes
from heads_lightning.configs.data import Share
from heads_lightning.data.mixing import MixedStream
from heads_lightning.data.scored import PreparedRecords, ScoredSplit, ScoredStream
from heads_lightning.data.shards import PreparedData, Split
from heads_lightning.data.stream import SampleStream, rows_of, sample_key
from heads_lightning.objectives.base import Objective
from heads_lightning.registry import ConfigError

VALIDATION_SEED = 20_220_728
"""Windows and transforms of validation do not depend on the seed of the experiment: results of different seeds are comparable."""


Stream = SampleStream | MixedStream | ScoredStream


class Stage(NamedTuple):
    """Optimizer steps in which sequences have one length."""

    first_step: int
    stream: Stream
    pieces: int
    """Samples of this stage in place of one of full length: a step reads as many positions."""


class StepBatches:
    """The micro-batches of optimizer steps, for one rank.

    Args:
        stages: the samples, by the first step that uses them; or one stream for all steps.
        objective: that made them.
        sizes: sequences of a step, over all ranks; multiples of world_size.
        micro_batch_size: sequences of a micro-batch, at most.
        rank: of this process.
        world_size: processes in all.
    """

    def __init__(
        self,
        stages: Stream | Sequence[Stage],
        objective: Objective,
        *,
        sizes: BatchSizes,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        if sizes.start % world_size:
            field = "global_batch_size" if sizes.start == sizes.full else "batch_start"
            raise ConfigError(
                f"trainer.{field}={sizes.start} sequences cannot be shared evenly by {world_size} devices; use a multiple of {world_size}"
            )
        self._stages = [Stage(0, stages, 1)] if isinstance(stages, Stream) else list(stages)
        self._attention = objective.attention
        self._sizes, self._micro_batch_size = sizes, micro_batch_size
        self._rank, self._world_size = rank, world_size

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one step."""
        stage = next(stage for stage in reversed(self._stages) if step >= stage.first_step)
        count = self._sizes.at(step) // self._world_size
        first = self._sizes.sequences(step) - self._sizes.sequences(stage.first_step) + self._rank * count
        share = stage.stream.examples(first * stage.pieces, count * stage.pieces)
        rows = self._micro_batch_size * stage.pieces
        starts = range(0, count * stage.pieces, rows)
        batches = [Batch.from_examples(rows_of(share, start, start + rows), self._attention) for start in starts]
        counted = sum(batch.counted for batch in batches)
        return [batch._replace(step_targets=counted) for batch in batches]


class TrainLoader:
    """One item per optimizer step of the run: the list of this rank's micro-batches.

    Args:
        batches: of each step.
        total_steps: of the run; the length of the loader, wherever it begins.
        first_step: to begin with.
        prefetch: make the next step in a thread while this one is used; the batches are the same.
    """

    def __init__(self, batches: StepBatches, *, total_steps: int, first_step: int = 0, prefetch: bool = True) -> None:
        self._batches, self._total_steps, self._first_step, self._prefetch = batches, total_steps, first_step, prefetch
        self.wait_seconds = 0.0
        """Time spent waiting for a step that was not ready, the first one (which nothing could have made ahead) not counted."""

    def __len__(self) -> int:
        return self._total_steps

    def seek(self, step: int) -> None:
        """Begin the next iteration at a step."""
        self._first_step = step

    def __iter__(self) -> Iterator[list[Batch]]:
        steps = range(self._first_step, self._total_steps)
        return self._ahead(steps) if self._prefetch else map(self._batches.step, steps)

    def _ahead(self, steps: range) -> Iterator[list[Batch]]:
        if not steps:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
            current = self._batches.step(steps[0])
            for step in steps[1:]:
                coming = thread.submit(self._batches.step, step)
                yield current
                started = time.perf_counter()
                current = coming.result()
                self.wait_seconds += time.perf_counter() - started
            yield current


class ValidationLoader:
    """The same samples at every pass: this rank's share of the first ones of a fixed order.

    Ranks may differ by one sequence but not in the number of batches, which sharded strategies need: one whose share is used up repeats a
    sequence without its targets.

    Args:
        stream: the samples.
        objective: that made them.
        sequences: samples in all.
        micro_batch_size: sequences of a batch, at most.
        rank: of this process.
        world_size: processes in all.
    """

    def __init__(self, stream: Stream, objective: Objective, *, sequences: int, micro_batch_size: int, rank: int, world_size: int) -> None:
        self._stream, self._attention, self._micro_batch_size = stream, objective.attention, micro_batch_size
        self._start, self._stop = sequences * rank // world_size, sequences * (rank + 1) // world_size
        self._batches = ceil(ceil(sequences / world_size) / micro_batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        for i in range(self._batches):
            start = self._start + i * self._micro_batch_size
            count = min(self._micro_batch_size, self._stop - start)
            examples = self._stream.examples(start, count) if count > 0 else without_targets(self._stream.examples(0, 1))
            yield Batch.from_examples(examples, self._attention)


def without_targets(examples: Examples) -> Examples:
    """The same examples with nothing to predict."""
    labels_BS = np.full_like(examples.labels_BS, IGNORE)
    counts_B = None if examples.counts_B is None else np.zeros_like(examples.counts_B)
    return examples._replace(labels_BS=labels_BS, counts_B=counts_B)


class TokenDataModule(lightning.LightningDataModule):
    """Training and validation batches of prepared data.

    Args:
        prepared: the tokens.
        objective: makes examples of them.
        sequence_length: positions of an example.
        global_batch_size: sequences of an optimizer step, over all ranks.
        micro_batch_size: sequences of one forward pass, at most.
        seed: of the order and the transforms of training.
        total_steps: optimizer steps of the run.
        validation_sequences: sequences of a validation; fewer if the split has fewer.
        rank: of this process; None: the trainer's (0 without one).
        world_size: processes in all; None: the trainer's (1 without one).
        ranks_per_share: neighbouring processes that read the same sequences, because they compute them together.
        prefetch: make the next step in a thread.
        length_start: positions of a sequence at the beginning of training. None: sequence_length throughout.
        length_warmup_steps: optimizer steps until sequence_length is reached.
        batch_start: sequences of an optimizer step at the beginning of training. None: global_batch_size throughout.
        batch_warmup_steps: optimizer steps until global_batch_size is reached.
        shares: what each group of shards contributes to training. None: every token as often as any other.
    """

    def __init__(
        self,
        prepared: PreparedData | PreparedRecords,
        objective: Objective,
        *,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        total_steps: int,
        validation_sequences: int = 128,
        rank: int | None = None,
        world_size: int | None = None,
        ranks_per_share: int = 1,
        prefetch: bool = True,
        length_start: int | None = None,
        length_warmup_steps: int = 0,
        batch_start: int | None = None,
        batch_warmup_steps: int = 0,
        shares: dict[str, Share] | None = None,
    ) -> None:
        super().__init__()
        self.prepared, self.objective = prepared, objective
        self.sequence_length, self.micro_batch_size = sequence_length, micro_batch_size
        self.batch_sizes = BatchSizes(global_batch_size, batch_start or global_batch_size, batch_warmup_steps, sequence_length)
        self.seed, self.total_steps, self._prefetch = seed, total_steps, prefetch
        self._rank, self._world_size, self._ranks_per_share = rank, world_size, ranks_per_share
        self._next_step = 0
        self._loader: TrainLoader | None = None
        self._shares = shares
        self.stages = self._length_stages(length_start, length_warmup_steps)
        self.train_stream = self.stages[-1].stream
        self.validation_stream = _stream(prepared.validation, objective, sequence_length, seed=VALIDATION_SEED, shift=False)
        self.validation_sequences = min(validation_sequences, self.validation_stream.windows)

    def _length_stages(self, length_start: int | None, warmup_steps: int) -> list[Stage]:
        """Lengths that double from length_start to sequence_length, each for as many steps; each reads the data in an order of its own."""
        doublings = 0 if length_start is None else (self.sequence_length // length_start).bit_length() - 1
        stages = []
        for number in range(doublings + 1):
            pieces = 2 ** (doublings - number)
            first_step = warmup_steps * number // max(doublings, 1)
            length = self.sequence_length // pieces
            stream = self._train_stream(
                length,
                seed=self.seed if pieces == 1 else sample_key("length", self.seed, length) >> 1,
                trained_before=self.batch_sizes.tokens(first_step),
            )
            stages.append(Stage(first_step, stream, pieces))
        return stages

    def _train_stream(self, length: int, *, seed: int, trained_before: int) -> Stream:
        train = self.prepared.train
        if self._shares is None or isinstance(train, ScoredSplit):
            return _stream(train, self.objective, length, seed=seed, shift=True, trained_before=trained_before)
        groups = [
            _tokens(replace(train, name=f"{train.name} ({name})", shards=shards), self.objective, length, seed=group_seed, shift=True)
            for name in self._shares
            for shards in [tuple(shard for shard in train.shards if shard.group == name)]
            for group_seed in [sample_key("group", seed, name) >> 1]
        ]
        mixed = MixedStream(groups, [*self._shares.values()], sequence_length=length, seed=seed, trained_before=trained_before)
        needed = self.batch_sizes.sequences(self.total_steps)
        if mixed.samples is not None and mixed.samples < needed:
            most = self.batch_sizes.steps((mixed.samples + 1) * self.sequence_length) - 1
            raise ConfigError(
                f"data.parts allow {mixed.samples} sequences (max_epochs of every source), and the run takes {needed}; raise one of the "
                f"max_epochs or leave it out, or use trainer.max_steps={most}"
            )
        return mixed

    # position

    def seek(self, step: int) -> None:
        """Make the next training iteration begin at an optimizer step."""
        self._next_step = step
        if self._loader is not None:
            self._loader.seek(step)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data. Steps taken are the trainer's count: what was made ahead does not matter."""
        trainer = self.trainer
        step = self._next_step if trainer is None else max(self._next_step, trainer.global_step)
        return {"step": step} | self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state was taken, or refuse if it would not be the same data."""
        ours = self._identity()
        changed = [key for key in [*ours, *state_dict] if key != "step" and state_dict.get(key) != ours.get(key)]
        if changed:
            key = changed[0]
            raise ConfigError(
                f"the checkpoint was trained with {key}={state_dict.get(key)}, this run has {ours.get(key)}: "
                f"its position in the data does not carry over; use the same {', '.join(changed)} or start a new run"
            )
        self.seek(state_dict["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "data fingerprint": self.prepared.fingerprint,
            "data.sequence_length": self.sequence_length,
            "trainer.global_batch_size": self.batch_sizes.full,
            "seed": self.seed,
            **({"data.parts": {name: list(share) for name, share in self._shares.items()}} if self._shares else {}),
            **({"objective.level": "document"} if self.objective.whole_documents else {}),
            **({"length warm-up": [[s.first_step, s.pieces] for s in self.stages]} if len(self.stages) > 1 else {}),
            **({"batch warm-up": list(self.batch_sizes[1:3])} if self.batch_sizes.start < self.batch_sizes.full else {}),
        }

    # loaders

    @property
    def wait_seconds(self) -> float:
        """Seconds that training has waited for data so far, the first step apart."""
        return 0.0 if self._loader is None else self._loader.wait_seconds

    def train_dataloader(self) -> TrainLoader:
        """The steps of the run from the position on (`seek`)."""
        rank, world_size = self._place()
        batches = StepBatches(
            self.stages,
            self.objective,
            sizes=self.batch_sizes,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        self._loader = TrainLoader(batches, total_steps=self.total_steps, first_step=self._next_step, prefetch=self._prefetch)
        return self._loader

    def val_dataloader(self) -> ValidationLoader:
        """The same batches every time."""
        return self._validation_loader(*self._place())

    def has_held_out_targets(self) -> bool:
        """Whether validation has anything to predict, over all ranks. Reads up to the first target: as a rule one batch."""
        return any(batch.counted for batch in self._validation_loader(0, 1))

    def _validation_loader(self, rank: int, world_size: int) -> ValidationLoader:
        return ValidationLoader(
            self.validation_stream,
            self.objective,
            sequences=self.validation_sequences,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )

    def transfer_batch_to_device(self, batch: Batch | list[Batch], device: torch.device, dataloader_idx: int) -> Batch | list[Batch]:
        """Called by Lightning with a step's micro-batches or with one of validation."""
        if isinstance(batch, Batch):
            return batch.to(device, non_blocking=True)
        return [micro_batch.to(device, non_blocking=True) for micro_batch in batch]

    def _place(self) -> tuple[int, int]:
        """Which share of the sequences is read here, and how many there are."""
        trainer = self.trainer
        rank = self._rank if self._rank is not None else trainer.global_rank if trainer is not None else 0
        world_size = self._world_size if self._world_size is not None else trainer.world_size if trainer is not None else 1
        return rank // self._ranks_per_share, world_size // self._ranks_per_share


def _stream(
    split: Split | ScoredSplit, objective: Objective, sequence_length: int, *, seed: int, shift: bool, trained_before: int | None = None
) -> Stream:
    if isinstance(split, ScoredSplit):
        return ScoredStream(split, objective, sequence_length=sequence_length, seed=seed)
    return _tokens(split, objective, sequence_length, seed=seed, shift=shift, trained_before=trained_before)


def _tokens(
    split: Split, objective: Objective, sequence_length: int, *, seed: int, shift: bool, trained_before: int | None = None
) -> SampleStream:
    stream = SampleStream(split.shards, objective, sequence_length=sequence_length, seed=seed, shift=shift, trained_before=trained_before)
    if stream.windows == 0:
        needed, longest = objective.window(sequence_length).length, max((len(s.tokens) for s in split.shards), default=0)
        raise ConfigError(
            f"the {split.name} split has {longest} tokens in a row, and data.sequence_length={sequence_length} needs {needed}; "
            f"use more data, another data.validation_fraction or a shorter data.sequence_length"
        )
    return stream
