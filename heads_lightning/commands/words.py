"""Words of a command line that is not read by Hydra."""

from heads_lightning.registry import ConfigError


def taken(words: list[str], flag: str, value: str) -> tuple[list[str], str | None]:
    """The words without `FLAG VALUE` or `FLAG=VALUE`, and the value; None where the flag is not there."""
    for i, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return words[:i] + words[i + 1 :], word.partition("=")[2]
        if word == flag:
            if i + 1 == len(words):
                raise ConfigError(f"{flag} needs a value: {flag} {value}")
            return words[:i] + words[i + 2 :], words[i + 1]
    return words, None
