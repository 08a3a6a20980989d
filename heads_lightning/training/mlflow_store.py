"""MLflow stores: which one a run uses, and opening it safely and quickly.

The upper half needs no MLflow and answers at once: address, how to look at it, where the folder of a run is. The lower half opens.
Left to itself MLflow breaks when two jobs open a fresh SQLite store at once (each creates the tables), needs seconds for the first
opening (it replays years of migrations) and pays a full journal sync for every write. So the embedded store is opened under a file lock,
starts as a copy of a finished empty database kept in the user's cache, and uses SQLite's write-ahead log where the disk is local (on a
network file system that log is not safe, and there a tracking server is the better choice).
"""

import gc
import importlib
import os
import re
import shutil
import sqlite3
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from heads_lightning.configs.tracking import MLflowConfig, check_uri
from heads_lightning.registry import ConfigError
from heads_lightning.training.run_folder import SIDECAR, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
LOCK_SECONDS = 300.0
"""Openers wait this long for each other; each holds the lock for a fraction of a second, the very first of a user for some."""
NETWORK_DISKS = re.compile(r"nfs|lustre|gpfs|beegfs|cifs|smb|ceph|glusterfs|panfs|afs|9p|sshfs|s3fs|juicefs|virtiofs", re.IGNORECASE)
RUN_DIR_TAG = "run_dir"
HEARTBEAT_TAG = "heartbeat"


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


def find_run_dir(run_id: str, run_root: Path, *, uri: str | None = None) -> Path | None:
    """The folder of an MLflow run: by the sidecar files below `run_root`, else by the tag that the run carries in its store.

    MLflow is asked (and imported) only when no sidecar names the run, and only where a store exists.
    """
    for sidecar in run_root.rglob(SIDECAR) if run_root.is_dir() else ():
        if read_json(sidecar).get("run_id") == run_id:
            return sidecar.parent
    store = resolve_store(MLflowConfig(uri=uri), run_root)
    if store.database is not None and not store.database.exists():
        return None
    from mlflow.exceptions import MlflowException

    with short_timeouts():
        try:
            tagged = connect(store).get_run(run_id).data.tags.get(RUN_DIR_TAG, "")
        except MlflowException:
            return None
    return Path(tagged) if tagged and Path(tagged).is_dir() else None


def reap(run_root: Path, *, uri: str | None = None, experiment: str = "heads_lightning", silent_seconds: float = 120.0) -> list[str]:
    """Mark as KILLED the runs that say RUNNING but have not given a sign for `silent_seconds` (a machine that died); returns their ids."""
    import time

    store = resolve_store(MLflowConfig(uri=uri), run_root)
    client = connect(store)
    found = client.get_experiment_by_name(experiment)
    reaped = []
    for run in client.search_runs([found.experiment_id], "attributes.status = 'RUNNING'", max_results=1000) if found else ():
        last = float(run.data.tags.get(HEARTBEAT_TAG, "nan"))
        if time.time() - last > silent_seconds:  # a run without the tag is not ours: NaN compares false
            client.set_tag(run.info.run_id, "ended", "no sign of life: reaped")
            client.set_terminated(run.info.run_id, "KILLED", end_time=int(last * 1000))
            reaped.append(run.info.run_id)
    return reaped


@contextmanager
def short_timeouts() -> Iterator[None]:
    """MLflow's defaults (seven retries of up to 120 s each) hang a command on a dead server. What the user has set stays."""
    ours = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    added = [name for name in ours if name not in os.environ]
    os.environ.update({name: ours[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def import_client(uri: str) -> None:
    """Import what `connect` needs for a store at this address."""
    searched = gc.isenabled()
    gc.disable()  # a quarter of the time was looking for garbage among two thousand modules
    try:
        with short_timeouts():  # telemetry is decided by the import
            importlib.import_module("mlflow.tracking")
            if not Store(uri=uri, artifacts=None).on_server:
                importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    finally:
        if searched:
            gc.enable()


def connect(store: Store) -> "MlflowClient":
    """A client of a store that exists or that a server owns; SQLite is opened under its lock."""
    import_client(store.uri)  # seconds that no other opener should wait for
    from mlflow import MlflowClient

    if store.database is None:
        return MlflowClient(store.uri)
    store.database.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(Path(f"{store.database}.lock")):
        _start_from_template(store.database, store.artifacts or "")
        client = MlflowClient(store.uri)
        client.get_experiment_by_name("Default")  # the store is opened by its first question, not by the constructor
        _use_write_ahead_log(store.database)
    return client


def experiment_id(client: "MlflowClient", store: Store, name: str) -> str:
    """Id of an experiment, created where it is missing; several processes may ask at once."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        artifacts = None if store.on_server else f"{store.artifacts}/{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ConfigError(f"the MLflow experiment {name!r} was deleted; restore it or choose another with tracking.experiment=NAME")
    return found.experiment_id


def template_folder() -> Path:
    """Folder of finished empty databases, one for each MLflow version."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "heads_lightning"


def _start_from_template(database: Path, artifacts: str) -> None:
    """Give a fresh store finished tables. Without a usable cache folder MLflow makes them itself, slower."""
    if database.exists() and database.stat().st_size:
        return
    with suppress(OSError):
        template = _template()
        copy = database.with_name(f".{database.name}.{os.getpid()}")
        shutil.copyfile(template, copy)
        with closing(sqlite3.connect(copy)) as connection, connection:
            connection.execute("UPDATE experiments SET artifact_location = ?", (f"{artifacts}/Default",))
        os.replace(copy, database)


def _template() -> Path:
    from mlflow.version import VERSION

    folder = template_folder()
    folder.mkdir(parents=True, exist_ok=True)
    template = folder / f"mlflow-{VERSION}.db"
    with file_lock(Path(f"{template}.lock")):
        if not template.exists():
            from mlflow import MlflowClient

            fresh = folder / f".mlflow-{VERSION}.{os.getpid()}.db"
            MlflowClient(f"sqlite:///{fresh}").get_experiment_by_name("Default")
            os.replace(fresh, template)
    return template


def _use_write_ahead_log(database: Path) -> None:
    """Stored in the file, so setting it again is free. A store in use keeps its mode until a quieter opener comes."""
    if on_local_disk(database):
        with closing(sqlite3.connect(database, timeout=5)) as connection, suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = wal")


def on_local_disk(path: Path) -> bool:
    """Whether `path` lies on a disk of this machine, as far as the mount table says."""
    import psutil

    path = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if path.is_relative_to(m.mountpoint)]
    return not mounts or not NETWORK_DISKS.search(max(mounts, key=lambda m: len(m.mountpoint)).fstype)


@contextmanager
def file_lock(path: Path, *, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """An exclusive lock between processes; where the file system has none, one that is made of the file's existence."""
    from filelock import FileLock, SoftFileLock

    try:
        lock = FileLock(path)
        lock.acquire(timeout=seconds)
    except (NotImplementedError, PermissionError):
        lock = SoftFileLock(f"{path}.soft")
        lock.acquire(timeout=seconds)
    try:
        yield
    finally:
        lock.release()
