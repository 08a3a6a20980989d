"""Sources whose files hold many documents."""

import gzip
import json

import pytest

from heads_lightning.configs.data import JsonlConfig, ParquetConfig
from heads_lightning.configs.tokenizer import ByteConfig
from heads_lightning.data import sources as sources_module
from heads_lightning.data.prepare import prepare
from heads_lightning.data.records import Jsonl, Parquet
from heads_lightning.registry import ConfigError

TEXTS = [f"document {i} é\n" * (1 + i % 4) for i in range(50)]


def documents(source) -> list[tuple[str, str]]:
    return [(d.name, d.text) for part in source.parts() for d in source.read(part)]


@pytest.mark.parametrize("part_size", [1, 70, 10**6])
def test_lines_of_json_come_once_wherever_the_parts_begin(tmp_path, monkeypatch, part_size):
    lines = [json.dumps({"text": t, "n": i}, ensure_ascii=bool(i % 2)) for i, t in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:30]) + "\n\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[30:]), encoding="utf-8")  # no newline at the end
    names = [name for name, _ in documents(Jsonl(JsonlConfig(root=str(tmp_path))))]
    monkeypatch.setattr(sources_module, "_PART_BYTES", (part_size, part_size))
    found = documents(Jsonl(JsonlConfig(root=str(tmp_path))))
    assert [text for _, text in found] == TEXTS
    assert [name for name, _ in found] == names  # and so the split
    assert len(set(names)) == 50


def test_gzipped_lines(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"content": t}) + "\n" for t in TEXTS)
    found = documents(Jsonl(JsonlConfig(root=str(tmp_path), text_field="content")))
    assert [text for _, text in found] == TEXTS
    raw = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(raw[: len(raw) // 2])
    source = Jsonl(JsonlConfig(root=str(tmp_path), text_field="content"))
    *_, last = source.read(source.parts()[0])
    assert last.problem.startswith("unreadable")


def test_bad_lines_are_counted_and_named(tmp_path):
    good = [json.dumps({"text": t}) for t in TEXTS]
    bad = ['{"text": ', '{"body": "x"}', '"text"', '{"text": 3}']
    (tmp_path / "a.jsonl").write_text("\n".join(good + bad), encoding="utf-8")
    config = JsonlConfig(root=str(tmp_path), cache_dir=str(tmp_path / "cache"), validation_fraction=0.3)
    with pytest.warns(UserWarning, match=r"left out 4 documents: a.jsonl:\d+ \(not JSON\), a.jsonl:\d+ \(no text under 'text'\)"):
        prepared = prepare(config, ByteConfig())
    assert prepared.manifest.skipped == {"not JSON": 1, "no text under 'text'": 3}
    assert sorted([*prepared.texts("train"), *prepared.texts("validation")]) == sorted(TEXTS)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": list(range(50))}), tmp_path / "a.parquet", row_group_size=7)
    source = Parquet(ParquetConfig(root=str(tmp_path)))
    assert len(source.parts()) == 8
    assert documents(source) == [(f"a.parquet:{i}", t) for i, t in enumerate(TEXTS)]
    config = ParquetConfig(root=str(tmp_path), cache_dir=str(tmp_path / "cache"), validation_fraction=0.3, prepare_processes=2)
    assert sorted([*(p := prepare(config, ByteConfig())).texts("train"), *p.texts("validation")]) == sorted(TEXTS)
    with pytest.raises(ConfigError, match=r"data.text_field=body is no column of a.parquet; it has text, n"):
        documents(Parquet(ParquetConfig(root=str(tmp_path), text_field="body")))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"b.parquet cannot be read as Parquet"):
        Parquet(ParquetConfig(root=str(tmp_path))).parts()
