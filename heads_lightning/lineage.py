"""What a run reads, as facts for its record: a name, a digest of the shards, where they come from, and how much there is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from heads_lightning.configs.data import DataConfig
from heads_lightning.data.scored import PreparedRecords
from heads_lightning.data.shards import PreparedData
from heads_lightning.data.sources import TRAIN, VALIDATION
from heads_lightning.tracking.run_folder import Dataset

DIGEST_CHARACTERS = 36
"""Of a sha256: as much as MLflow keeps."""


def datasets_of(prepared: PreparedData | PreparedRecords, data: DataConfig) -> Iterator[Dataset]:
    """The two splits of prepared data."""
    for split in (TRAIN, VALIDATION):
        digest = hashlib.sha256(f"{prepared.fingerprint} {split}".encode()).hexdigest()[:DIGEST_CHARACTERS]
        kind = "hugging_face" if data.name == "huggingface" else "local"
        yield Dataset(prepared.folder.name, digest, split, kind, _source(prepared, data), _sizes(prepared, split))


def _source(prepared: PreparedData | PreparedRecords, data: DataConfig) -> dict[str, Any]:
    """What the config says of the source; for MLflow, which looks there, a folder as `uri`."""
    said = {key: value for key, value in data.content().items() if value not in (None, [], "")}
    facts = prepared.manifest.facts if isinstance(prepared, PreparedData) else {}
    return {"uri": str(facts.get("root") or said.get("root") or prepared.folder.resolve()), **said}


def _sizes(prepared: PreparedData | PreparedRecords, split: str) -> dict[str, int]:
    if isinstance(prepared, PreparedRecords):
        return {"sequences": int(prepared.facts["sequences"][split])}
    entry = prepared.manifest.splits[split]
    return {"documents": entry.documents, "tokens": entry.tokens, "bytes": entry.bytes}
