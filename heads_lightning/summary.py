"""The last page of a run: what was reached, how that compares, and the commands that go on from here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.value import ValueConfig
from heads_lightning.evaluation.protocol import Report

if TYPE_CHECKING:
    from heads_lightning.evaluation.scoring import Sample


MOST_SPIKES = 5
"""That the page names."""


def summary_text(
    config: ExperimentConfig,
    *,
    run_dir: Path,
    report: Report | None,
    samples: list[Sample],
    metrics: dict[str, float],
    seconds: float,
    ui_command: str | None,
    spikes: Sequence[str] = (),
) -> str:
    """The page as plain text."""
    blocks = [_training(metrics, seconds, config.objective.predicts), _spikes(spikes), values_text(config, metrics)]
    if report is not None:
        blocks.append(report_text(report, samples))
    blocks.append(_next_steps(config, run_dir, ui_command, report))
    return "\n\n".join(block for block in blocks if block) + "\n"


def report_text(report: Report, samples: list[Sample]) -> str:
    """What an evaluation found, as plain text."""
    blocks = [_left_to_right(report), _masked(report), _infilling(report), _proof(report), _samples(samples) if samples else ""]
    return "\n\n".join(block for block in blocks if block)


def _training(metrics: dict[str, float], seconds: float, predicts: str) -> str:
    unit = "{:.3f} nats per target" if predicts == "token" else "{:.4f} per target"
    shown = [
        ("training loss", "train/loss", unit),
        ("held-out loss", "val/loss", unit),
        ("steps skipped", "train/bad_steps", "{:.0f} (gradient not finite)"),
    ]
    rows = [(name, form.format(metrics[key])) for name, key, form in shown if key in metrics and (key != "train/bad_steps" or metrics[key])]
    speed = metrics.get("speed/tokens_per_second")
    rows.append(("time", f"{seconds:.0f} s of steps" + (f", {speed:,.0f} positions/s at the end" if speed else "")))
    return _table("Training", rows)


def _spikes(spikes: Sequence[str]) -> str:
    if not spikes:
        return ""
    more = [f"  and {len(spikes) - MOST_SPIKES} more in spikes.jsonl"] if len(spikes) > MOST_SPIKES else []
    return "\n".join(["Loss spikes", *(f"  {spike}" for spike in spikes[:MOST_SPIKES]), *more])


def values_text(config: ExperimentConfig, metrics: dict[str, float]) -> str:
    """What validation says of values: see losses.value.ValueStatistics."""
    if "val/calibration_error" not in metrics:
        return ""
    objective = config.objective
    assert isinstance(objective, ValueConfig)
    paired = objective.pairwise
    shown = [
        ("explained variance", "val/explained_variance", "{:.3f}  (1 is perfect, 0 is always the mean)"),
        ("calibration error", "val/calibration_error", "{:.3f}  (mean distance of prediction and target, by bins; see reliability.png)"),
        ("right pairs" if paired else "right side", "val/accuracy", "{:.1%}" if paired else "{:.1%} on the target's side of the middle"),
        ("predicted", "val/value_mean", "{:.3f} on average"),
        ("target", "val/target_mean", "{:.3f} on average"),
    ]
    rows = [(name, form.format(metrics[key])) for name, key, form in shown if key in metrics]
    kind = "pairs" if paired else f"tokens (loss {objective.loss}, {objective.alignment})"
    return _table(f"Values of held-out {kind}", rows)


def _left_to_right(report: Report) -> str:
    if report.left_to_right_refusal is not None:
        return _table("Left to right: bits per byte of held-out files", [("none", report.left_to_right_refusal)])
    if report.left_to_right_bits_per_byte is None:
        return ""
    rows = [("this model", f"{report.left_to_right_bits_per_byte:.3f}")]
    if report.ngram_bits_per_byte is not None:
        rows.append(("5-gram byte model", f"{report.ngram_bits_per_byte:.3f}"))
    return _table("Left to right: bits per byte of held-out files", rows)


def _masked(report: Report) -> str:
    if report.masked_bits_per_byte is None:
        return ""
    rows = [("15 % hidden tokens, from both sides", f"{report.masked_bits_per_byte:.3f}")]
    if report.bound_bits_per_byte is not None:
        rows.append(("the text, upper bound", f"{report.bound_bits_per_byte:.3f}"))
    if report.left_to_right_bits_per_byte is None and report.ngram_bits_per_byte is not None:
        rows.append(("the text, 5-gram byte model", f"{report.ngram_bits_per_byte:.3f}"))
    return _table("Masked: bits per byte of held-out files", rows)


def _infilling(report: Report) -> str:
    if report.prefix_bits_per_byte is None:
        return ""
    rows = [("given the prefix alone", f"{report.prefix_bits_per_byte:.3f} bits per byte")]
    if report.infill_bits_per_byte is not None:
        rows.insert(0, ("given prefix and suffix", f"{report.infill_bits_per_byte:.3f} bits per byte"))
    floor = report.floors
    if report.infill_exact_match is not None and floor is not None:
        rows += [
            ("exact match", f"{report.infill_exact_match:.1%}   floors: line lookup {floor.lookup_exact_match:.1%}, "
             f"most frequent line {floor.frequent_exact_match:.1%}"),
            ("edit similarity", f"{report.infill_edit_similarity:.3f}  floors: line lookup {floor.lookup_edit_similarity:.3f}, "
             f"most frequent line {floor.frequent_edit_similarity:.3f}"),
            ("ends by itself", f"{report.infill_stopped:.0%} of infills"),
        ]  # fmt: skip
    if report.stop_accuracy is not None:
        rows.append(("ends where the line does", f"{report.stop_accuracy:.0%} of lines, fed the true line"))
    if report.random_span_bits_per_byte is not None:
        match = "" if report.random_span_exact_match is None else f", exact match {report.random_span_exact_match:.1%}"
        rows.append((f"{report.random_spans} random stretches", f"{report.random_span_bits_per_byte:.3f} bits per byte{match}"))
    text = _table(f"Infilling {report.hidden_lines} hidden lines of held-out files", rows)
    if floor is not None and report.infill_exact_match is not None and report.infill_exact_match <= floor.lookup_exact_match:
        text += (
            "\n  A model this small, trained for minutes, infills real code at or below those floors; the bits per byte show what it has"
            "\n  learned. experiment=fim_proof proves the pipeline in about a minute; experiment=fim_gpu goes further on a GPU."
        )
    return text


def _proof(report: Report) -> str:
    if report.copy_accuracy_prefix is None:
        return ""
    rows = [("given the prefix alone", f"{report.copy_accuracy_prefix:.1%} of hidden tokens")]
    if report.copy_accuracy_infill is not None:
        rows.insert(0, ("given prefix and suffix", f"{report.copy_accuracy_infill:.1%} of hidden tokens (worst layout)"))
    return _table("Proof: the suffix repeats what is hidden", rows)


def _samples(samples: list[Sample]) -> str:
    from heads_lightning.evaluation.scoring import show_sample

    return "Infilled lines\n" + "\n".join(show_sample(sample) for sample in samples).rstrip()


def _next_steps(config: ExperimentConfig, run_dir: Path, ui_command: str | None, report: Report | None) -> str:
    run_dir = _from_here(run_dir)
    rows = [("run folder", str(run_dir))]
    if ui_command:
        rows.append(("see it in MLflow", ui_command))
    if config.objective.name == "fim" or (report is not None and report.infill_exact_match is not None):
        rows.append(("infill your own", f"heads-lightning infill checkpoint={run_dir} prefix_file=before.py suffix_file=after.py"))
    rows.append(
        (
            "train further",
            f"heads-lightning train resume={run_dir} trainer.max_steps={2 * config.trainer.steps(config.data.sequence_length)}",
        )
    )
    return _table("Next", rows)


def _from_here(path: Path) -> Path:
    """The path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])
