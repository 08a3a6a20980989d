"""A run that is asked to stop, at moments other than in the middle of training, and a disk that is full: what is said, and what is kept."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as lightning
import pytest
from conftest import TINY
from test_ten_mistakes import check

from heads_lightning.__main__ import main
from heads_lightning.composition import compose
from heads_lightning.run import train
from heads_lightning.training.saving import Interrupted

ROOT = Path(__file__).resolve().parents[1]
_LOST = """
import os, signal, sys, weakref
from heads_lightning.commands.dispatch import guarded
from heads_lightning.tracking.stopping import obey

class Lock: pass

def lost():  # as importlib's locks: an exception in such a callback is printed, if at all, and forgotten
    sys.unraisablehook = lambda _: None
    lock = Lock()
    last = weakref.ref(lock, lambda _: os.kill(os.getpid(), NUMBER))
    del lock
    print("goes on", flush=True)
    obey()

def broken():
    try:
        os.kill(os.getpid(), NUMBER)
    except BaseException:
        raise ImportError("half a module") from None

sys.exit(guarded(HOW, traceback=False))
"""


@pytest.mark.parametrize("how", ["lost", "broken"])
@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")])
def test_a_signal_in_the_middle_of_an_import_is_obeyed(how: str, number: int, code: int, line: str) -> None:
    script = _LOST.replace("NUMBER", str(int(number))).replace("HOW", how)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, f"heads-lightning: {line}\n")
    assert done.stdout == ("goes on\n" if how == "lost" else "")


class SendsWhenValidating(lightning.Callback):
    """Ctrl-C at the beginning of a validation, once or twice."""

    def __init__(self, times: int) -> None:
        self.times = times

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for _ in range(self.times):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("times", "raised"), [(1, Interrupted), (2, KeyboardInterrupt)])
def test_ctrl_c_in_the_last_validation(times: int, raised: type, tiny: list[str], tmp_path: Path, capfd) -> None:
    """Once: the run stops there, though no step is left to stop after. Twice: at once. A notebook has its own Ctrl-C back."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(raised) as stop:
        train(compose(tiny), tmp_path / "run", callbacks=[SendsWhenValidating(times)])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not (tmp_path / "run/summary.txt").exists()
    assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1
    if times == 1:
        assert str(stop.value).endswith(f"saved {tmp_path}/run/checkpoints/step-00000004.ckpt")


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel takes no file of more than 300 kB, as a full disk does not; a checkpoint has more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_checkpoint(tiny: list[str], tmp_path: Path, request: pytest.FixtureRequest, capsys) -> None:
    assert main(["prepare", *tiny]) == 0
    request.getfixturevalue("small_files")
    capsys.readouterr()
    assert main(["train", *tiny, f"hydra.run.dir={tmp_path}/run"]) == 1
    out, err = capsys.readouterr()
    for step in (2, 4):  # in one line, with the disk's own reason
        place = f"{tmp_path}/run/checkpoints/step-{step:08d}.ckpt"
        assert f"could not save {place}: [Errno 27] File too large; what was saved before is kept\n" in out
    assert "Error executing job" not in err
    check("full disk", err[err.index("heads-lightning:") :].replace(str(tmp_path), "…"))


def test_what_ctrl_c_could_not_save_is_not_called_saved(tiny: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert main(["prepare", *tiny]) == 0
    request.getfixturevalue("small_files")
    with pytest.raises(Interrupted) as stop:
        train(compose(tiny), tmp_path / "run", callbacks=[SendsWhenValidating(1)])
    assert str(stop.value) == "stopped by SIGINT after a whole step; it could not be saved"


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever command meets it: one line, and where a run was going on, how it goes on."""
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    assert main(["schema", "--out", "taken/schema"]) == 1
    check("no place to write", capsys.readouterr().err)
    assert main(["train", *TINY, "hydra.run.dir=run"]) == 0
    Path("run/artifacts/loss.png").unlink()
    Path("run/artifacts/loss.png").mkdir()
    capsys.readouterr()
    assert main(["train", "resume=run", "trainer.max_steps=6"]) == 1
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said[0].startswith("heads-lightning: ")
    assert "run/artifacts/loss.png: Is a directory; choose another path" in said[0]
    assert said[1].startswith("  go on with: heads-lightning train resume=")
