"""Opening an MLflow store safely and quickly.

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
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from heads_lightning.registry import ConfigError
from heads_lightning.tracking.file_lock import file_lock
from heads_lightning.tracking.mlflow_store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

NETWORK_DISKS = re.compile(r"nfs|lustre|gpfs|beegfs|cifs|smb|ceph|glusterfs|panfs|afs|9p|sshfs|s3fs|juicefs|virtiofs", re.IGNORECASE)


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
