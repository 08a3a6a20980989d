"""The Hub that is not there, is there, or is not needed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from hub_server import serving
from test_ten_mistakes import check

from heads_lightning.data.huggingface import HuggingFace
from heads_lightning.hub import check_model
from heads_lightning.registry import ConfigError

KEY = {"key": "backbone.source", "revision": None}


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Hub's address, where nobody listens, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_that_is_not_there_is_one_line_in_seconds(nobody: Path, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError) as error:
        check_model("someone/model", **KEY)
    assert time.monotonic() - began < 10
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # the library announces each of its tries
    check("no Hub", f"heads-lightning: {error.value}".replace("http://127.0.0.1:1", "https://huggingface.co"))


def test_a_hub_that_answers_is_asked_once(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        check_model("someone/model", **KEY)
        assert len(hub.requests) == 1


def test_what_is_here_needs_no_hub(nobody: Path, tmp_path: Path) -> None:
    check_model(str(tmp_path), **KEY)
    snapshot = nobody / "models--someone--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (nobody / "models--someone--model/refs").mkdir()
    (nobody / "models--someone--model/refs/main").write_text("abc")
    check_model("someone/model", **KEY)


def test_no_name_and_no_folder(nobody: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone.source=no/such/folder is no folder, and cannot be a name on the Hub"):
        check_model("no/such/folder", **KEY)


def test_a_dataset_of_a_hub_that_is_not_there(nobody: Path) -> None:
    pytest.importorskip("datasets")
    from heads_lightning.configs.data import HuggingFaceDataConfig

    with pytest.raises(ConfigError, match=r"data.path=someone/texts is no folder and not in the cache.*127.0.0.1:1"):
        HuggingFace(HuggingFaceDataConfig(path="someone/texts")).parts()
