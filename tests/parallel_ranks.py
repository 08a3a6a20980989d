"""Trains experiments one after the other on every rank of a torchrun job: `python parallel_ranks.py CASES.json`, {folder: overrides}."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from heads_lightning.composition import compose
from heads_lightning.run import train

if __name__ == "__main__":
    for folder, overrides in json.loads(Path(sys.argv[1]).read_text()).items():
        train(compose(overrides), Path(folder))
