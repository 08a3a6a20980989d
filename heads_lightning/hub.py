"""The Hugging Face Hub where it cannot be reached: said in seconds and in one line, before a library asks for half a minute."""

import time
from pathlib import Path

from heads_lightning.registry import ConfigError

PAUSES = (0.5, 1.5)
"""Seconds between tries: a network that loses packets answers one of three."""
ANSWER_SECONDS = 5.0


def check_model(name: str, *, key: str, revision: str | None) -> None:
    """Refuse a model that is neither a folder nor in the cache while the Hub cannot be asked for it.

    Args:
        name: folder or name on the Hub.
        key: setting that holds it.
        revision: branch, tag or commit.

    Raises:
        ConfigError: with the ways out.
    """
    if Path(name).expanduser().exists():
        return
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError as error:  # no name at all, e.g. a path
        raise ConfigError(f"{key}={name} is no folder, and cannot be a name on the Hub ({str(error).splitlines()[0]})") from None
    if not isinstance(cached, str):
        check_answer(f"{key}={name}")


def check_answer(wanted: str) -> None:
    """Refuse `wanted`, a setting that is no folder and not in the cache, where the Hub does not answer.

    Raises:
        ConfigError: with the ways out.
    """
    reason = _no_answer()
    if reason is not None:
        raise ConfigError(
            f"{wanted} is no folder and not in the cache, and the Hugging Face Hub cannot be asked ({reason}); give a folder, or name by "
            f"$HF_HOME a cache that holds it"
        )


def _no_answer() -> str | None:
    """Why the Hub does not answer; None where it does, whatever it says."""
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE=1"
    reason = ""
    for pause in (*PAUSES, None):
        try:
            get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
            return None
        except Exception as error:  # its client has been another one before
            reason = f"{constants.ENDPOINT}: {error}"
        if pause is not None:
            time.sleep(pause)
    return reason
