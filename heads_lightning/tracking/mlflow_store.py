"""MLflow stores: which one a run uses, and how to look at it. Needs no MLflow and answers at once; mlflow_opening.py opens one."""

import errno
import os
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from heads_lightning.configs.tracking import MLflowConfig, check_uri
from heads_lightning.registry import ConfigError

URI_VARIABLE = "MLFLOW_TRACKING_URI"


class Store(NamedTuple):
    """Where MLflow keeps runs."""

    uri: str
    """Full address, passwords included: never write it to a file, see `shown`."""
    artifacts: str | None
    """Folder for artifacts of new experiments; None where a server decides."""

    @property
    def shown(self) -> str:
        """The address without its password."""
        return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", self.uri)

    def hide_password(self, text: str) -> str:
        """A message of a library without the password that it may quote, as it was written or decoded."""
        found = re.search(r"://[^/@:]*:([^/@]+)@", self.uri)
        for secret in (found[1], unquote(found[1])) if found else ():
            text = text.replace(secret, "***")
        return text

    @property
    def database(self) -> Path | None:
        """File of an SQLite store."""
        return Path(self.uri.removeprefix("sqlite:///").partition("?")[0]) if self.uri.startswith("sqlite:///") else None

    @property
    def on_server(self) -> bool:
        """Whether a tracking server stands between."""
        return self.uri.startswith(("http://", "https://", "databricks"))

    def check_place(self, *, make: bool) -> None:
        """Refuse an SQLite file that cannot be written: unlike a server that is down, no later time will be better.

        Args:
            make: make its folder and its lock; else nothing is left behind, and what only the attempt would show is not seen.

        Raises:
            ConfigError: with the reason.
        """
        if self.database is None:
            return
        try:
            if make:
                self.database.parent.mkdir(parents=True, exist_ok=True)
                with open(f"{self.database}.lock", "ab"):
                    pass
            # asked, not opened: closing a second descriptor of a file drops the locks that SQLite holds in this process
            found = next(path for path in (self.database, *self.database.parents) if path.exists())
            wrong = errno.ENOTDIR if found != self.database and not found.is_dir() else 0 if os.access(found, os.W_OK) else errno.EACCES
            if wrong:
                raise OSError(wrong, os.strerror(wrong), str(found))
        except OSError as error:
            raise ConfigError(
                f"{self.uri} cannot be written ({error.strerror}: {error.filename}); name a file on a disk of this machine, "
                f"e.g. tracking.uri=sqlite:///runs/mlflow.db, or tracking=none"
            ) from None


def resolve_store(config: MLflowConfig, run_root: Path, environment: Mapping[str, str] = os.environ) -> Store:
    """The store of a run: `tracking.uri`, else $MLFLOW_TRACKING_URI, else SQLite in the run root. Paths become absolute."""
    uri = config.uri or environment.get(URI_VARIABLE) or f"sqlite:///{(run_root / 'mlflow.db').resolve()}"
    check_uri(uri, source="tracking.uri" if config.uri else f"${URI_VARIABLE}")
    return store_at(uri, run_root)


def store_at(uri: str, folder: Path) -> Store:
    """The store of an address, made absolute. Artifacts: a server's, or beside an SQLite file, or in `folder` for another database."""
    store = Store(uri=uri, artifacts=None)
    if store.on_server:
        return store
    if store.database is None:
        return store._replace(artifacts=str((folder / "mlartifacts").resolve()))
    if not store.database.name or store.database.is_dir():
        raise ConfigError(f"tracking.uri={uri} names no database file; use tracking.uri=sqlite:///FOLDER/mlflow.db")
    database = store.database.expanduser().resolve()
    return Store(uri=f"sqlite:///{database}", artifacts=str(database.parent / "mlartifacts"))


def ui_command(store: Store, *, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """The exact command that shows the store in a browser."""
    if store.on_server:
        page = f"/#/experiments/{experiment_id}/runs/{run_id}" if experiment_id and run_id else ""
        return f"python -m webbrowser {store.shown}{page}"
    program = Path(sysconfig.get_path("scripts")) / "mlflow"
    database = store.database
    uri = f"sqlite:///{_short(database)}" if database else store.shown
    return f"{_short(program) if program.exists() else 'mlflow'} ui --backend-store-uri {uri}"


def _short(path: Path) -> str:
    """Relative to the working folder where it lies inside it: commands are for people to read."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
