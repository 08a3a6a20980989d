"""`ui`: MLflow's pages on the store that the runs are in, in the foreground until Ctrl-C."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heads_lightning.commands.arguments import read
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.registry import ConfigError, RunError
from heads_lightning.tracking.mlflow_store import Store, resolve_store

TRIES = 20
"""Ports that are tried, one after the other."""


@dataclass
class Arguments:
    """Which store, and where it is shown."""

    run_root: str = "runs"
    """Folder that holds runs: its mlflow.db is shown where neither `uri` nor $MLFLOW_TRACKING_URI names another store."""
    uri: str | None = None
    """Store, as in tracking.uri of the runs."""
    host: str = "127.0.0.1"
    """Address to listen on; this machine alone by default, for the pages ask nobody for a password."""
    port: int | None = None
    """Port. null: 5000, or the first free one after it."""

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is out of range; it takes 1 to 65535")


def main(arguments: Sequence[str]) -> int:
    """`heads-lightning ui [run_root=FOLDER] [uri=STORE] [host=ADDRESS] [port=N]`."""
    options, _ = read(Arguments, arguments)
    store = resolve_store(MLflowConfig(uri=options.uri), Path(options.run_root))
    if store.on_server:
        print(f"the runs are on a server, which shows them itself: {store.shown}")
        return 0
    if store.database is not None and not store.database.is_file():
        raise ConfigError(f"there is no MLflow store at {store.database}; runs with tracking=mlflow make one, "
                          f"run_root=FOLDER or uri=STORE names another")  # fmt: skip
    port = choose_port(options.host, options.port)
    print(f"{store.shown} is shown at http://{options.host}:{port}   (Ctrl-C ends it)", flush=True)
    return _serve(store, options.host, port)


def choose_port(host: str, wanted: int | None) -> int:
    """`wanted`, or the first free port from 5000.

    Raises:
        RunError: it is taken; the line names a free one.
    """
    first = wanted if wanted is not None else 5000
    free = next((port for port in range(first, min(first + TRIES, 65536)) if _is_free(host, port)), None)
    if free is None:
        raise RunError(f"ports {first} to {first + TRIES - 1} of {host} are all taken; name another one: port=N")
    if wanted is not None and free != wanted:
        raise RunError(f"port={wanted} is taken; port={free} is free")
    return free


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno not in (errno.EACCES, errno.EADDRINUSE):
                raise ConfigError(f"host={host} is no address of this machine; use host=127.0.0.1, or host=0.0.0.0 for all") from None
            return False
    return True


def _serve(store: Store, host: str, port: int) -> int:
    """MLflow's server in a process of its own; its address is handed over by the environment, which other users cannot read."""
    command = [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": store.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    if store.artifacts is not None:
        environment["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = store.artifacts
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait()
    except (KeyboardInterrupt, SystemExit):
        os.killpg(process.pid, signal.SIGTERM)  # the server has workers of its own
        process.wait()
        return 0
