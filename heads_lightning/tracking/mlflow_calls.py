"""One MLflow run as it is written to: the many failures of its clients become two, and what it refuses is told and left out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heads_lightning.registry import ConfigError
from heads_lightning.tracking.mlflow_limits import MAX_TAG, allowed_name, cut
from heads_lightning.tracking.mlflow_opening import connect
from heads_lightning.tracking.mlflow_store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

ITEMS_PER_BATCH = 100
"""Parameters or tags in a call: MLflow's limit."""
FINAL = ("INVALID_PARAMETER_VALUE", "ENDPOINT_NOT_FOUND")
"""Errors of MLflow that another try does not change."""

ANSWERS = {
    "error code 401": "it does not know you (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "error code 403": "it forbids this (403): the user of MLFLOW_TRACKING_USERNAME or MLFLOW_TRACKING_TOKEN may not write there",
    "error code 404": "what answers there is not MLflow (404)",
    "not in a valid JSON format": "what answers there is not MLflow",
    "too many 50": "it answers with errors of its own (5xx)",
}
"""What a server's answer means, by what MLflow says of it."""


class NotSent(Exception):
    """The store did not take something now; it may later."""


class Refused(Exception):
    """The store will never take it."""


class Calls:
    """Calls about the run `run_id`, which is the copy of `run_dir`. `say(text)` is called with what the user should know."""

    def __init__(self, run_dir: Path, *, store: Store, say: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.store = store
        self.run_id = self.experiment_id = ""
        """Known once the run is found or created."""
        self._say = say
        self._said: set[str] = set()
        self._client: MlflowClient | None = None

    @property
    def client(self) -> "MlflowClient":
        """Client of the store, connected when it is first asked for."""
        client = self._client = self._client or self.call(connect, self.store)
        return client

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call MLflow.

        Raises:
            NotSent: the store did not answer, or not with what was asked for.
            Refused: another try would not change its answer.
        """
        try:
            return function(*arguments, **options)
        except (NotSent, Refused):
            raise
        except ConfigError as error:
            raise NotSent(str(error)) from error
        except Exception as error:  # clients of databases, HTTP and object stores each raise their own
            if getattr(error, "error_code", "") in FINAL:
                raise Refused(self.store.hide_password(_reason(error))) from error
            raise NotSent(self.store.hide_password(_reason(error))) from error

    def batch(self, **items: Sequence[Any]) -> bool:
        """Log parameters, tags or metrics; returns whether MLflow took them. What it refuses stays in the folder and is told."""
        try:
            self.call(self.client.log_batch, self.run_id, **items)
        except Refused as error:
            if self.call(self.client.get_run, self.run_id).info.lifecycle_stage == "deleted":
                raise NotSent("the run was deleted in MLflow; restored there, it goes on") from None
            what = ", ".join(f"{len(v)} {k}" for k, v in items.items())
            self.tell_once(f"MLflow refuses {what} ({error}); they stay in {self.run_dir}")
            return False
        return True

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags; long values are cut, visibly."""
        from mlflow.entities import RunTag

        wanted = [RunTag(allowed_name(k), cut(str(v), MAX_TAG)) for k, v in tags.items()]
        for i in range(0, len(wanted), ITEMS_PER_BATCH):
            self.batch(tags=wanted[i : i + ITEMS_PER_BATCH])

    def tell_once(self, text: str) -> None:
        """Tell the user what was not told yet."""
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def _reason(error: BaseException) -> str:
    """One line of what may be a page."""
    text = str(error) or type(error).__name__
    if "Connection refused" in text:
        return "connection refused"
    if "timed out" in text or "timeout" in text.lower():
        return "no answer in time"
    for sign, meaning in ANSWERS.items():
        if sign in text:
            return meaning
    return cut(text.strip().splitlines()[0], 300)
