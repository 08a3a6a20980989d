"""What MLflow takes: the characters of a name, and how long a name or a value may be."""

import posixpath
import re

MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 5000
"""MLflow's own limits; servers differ on tags (5000 to 8000)."""
MAX_DATASET_NAME = 500
CUT = " … (cut)"


def allowed_name(name: str) -> str:
    """The nearest name that MLflow takes: letters, digits and `_ - . space : /`, a relative path, 250 characters."""
    taken = posixpath.normpath(re.sub(r"[^\w.\- :/]", "_", name, flags=re.ASCII).lstrip("/") or "_")
    taken = re.sub(r"^(\.\.?/)+|^\.\.?$", "_", taken)
    return taken[:MAX_KEY].rstrip("/")


def cut(text: str, length: int) -> str:
    """The text, or its beginning with a mark where it is too long."""
    return text if len(text) <= length else text[: length - len(CUT)] + CUT
