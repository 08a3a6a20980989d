"""What a run records, whoever takes it. open_run.py has the leaf that writes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from heads_lightning.tracking.process import Status, status_of
from heads_lightning.tracking.run_folder import Dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunLog(ABC):
    """What a run records. Leaves: FolderRunLog (the process that tracks) and NullRunLog (every other one)."""

    run_dir: Path
    run_id: str | None
    """MLflow run id; None while MLflow is still being opened, and where it is not used."""
    uri: str | None
    """Store, without password."""

    @abstractmethod
    def log_metrics(self, values: Mapping[str, Any], *, step: int, tokens: int | None = None) -> None:
        """Record numbers at an optimizer step (floats or tensors of one number, which must be on the host already)."""

    @abstractmethod
    def log_text(self, name: str, text: str) -> None:
        """Record a text as artifacts/`name`, e.g. `samples/step_100.txt`."""

    @abstractmethod
    def log_file(self, path: Path, *, folder: str = "") -> None:
        """Record an existing file or folder, under `folder` in MLflow. It is not copied in the run folder; it must stay."""

    @abstractmethod
    def log_figure(self, name: str, figure: "Figure") -> None:
        """Record a Matplotlib figure as artifacts/`name`; its suffix (.png, .svg, …) chooses the format."""

    @abstractmethod
    def log_table(self, name: str, *, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table as artifacts/`name` (.json), in the form that MLflow's page shows as a table."""

    @abstractmethod
    def log_datasets(self, datasets: Sequence[Dataset]) -> None:
        """Record what the run reads."""

    @abstractmethod
    def log_model(self, folder: Path, *, step: int) -> None:
        """Record a folder in MLflow's format of a model (served_model.py), trained for `step` optimizer steps. It must stay."""

    @abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""

    @abstractmethod
    def flush(self) -> None:
        """Have the disk hold everything and MLflow sent everything soon; does not wait for MLflow. For validations and checkpoints."""

    @abstractmethod
    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run. The first call decides; later ones do nothing."""

    @abstractmethod
    def wait_for_run_id(self, seconds: float) -> str | None:
        """The MLflow run id, waiting for it at most so long."""

    @abstractmethod
    def ui_command(self) -> str | None:
        """The exact command that shows this run in MLflow's pages; None where MLflow has no part in it."""

    @abstractmethod
    def describe(self) -> str:
        """One line: where the numbers are."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.finish(status_of(error))


class NullRunLog(RunLog):
    """Takes every call and records nothing: for all ranks but the first."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.run_id = None
        self.uri = None

    def log_metrics(self, values: Mapping[str, Any], *, step: int, tokens: int | None = None) -> None:
        pass

    def log_text(self, name: str, text: str) -> None:
        pass

    def log_file(self, path: Path, *, folder: str = "") -> None:
        pass

    def log_figure(self, name: str, figure: "Figure") -> None:
        pass

    def log_table(self, name: str, *, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def log_datasets(self, datasets: Sequence[Dataset]) -> None:
        pass

    def log_model(self, folder: Path, *, step: int) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def flush(self) -> None:
        pass

    def finish(self, status: Status = "FINISHED") -> None:
        pass

    def wait_for_run_id(self, seconds: float) -> str | None:
        return None

    def ui_command(self) -> str | None:
        return None

    def describe(self) -> str:
        return f"the first rank records this run in {self.run_dir}"
