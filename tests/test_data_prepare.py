"""Preparation: the right documents, the same tokens however they are made, whole or not at all, one line for every mistake."""

import json
import operator
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from heads_lightning.configs.data import FilesConfig, RepeatConfig, StdlibConfig
from heads_lightning.configs.tokenizer import BPEConfig, ByteConfig
from heads_lightning.data import prepare as prepare_module
from heads_lightning.data import shards as shards_module
from heads_lightning.data import sources as sources_module
from heads_lightning.data.prepare import prepare, prepared_folder
from heads_lightning.data.shards import PreparedData, ShardWriter
from heads_lightning.data.sources import Files, Repeat, Stdlib, place, split
from heads_lightning.data.workers import WorkerError, run_jobs
from heads_lightning.registry import ConfigError

BPE = BPEConfig(vocab_size=400, num_sentinels=0)


@pytest.fixture
def corpus(tmp_path) -> Path:
    root = tmp_path / "corpus"
    for i in range(60):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function_{i}(value):\n    return value + {i}\n" * (1 + i % 5), encoding="utf-8")
    return root


def config(corpus: Path, **fields) -> FilesConfig:
    defaults = {"cache_dir": str(corpus.parent / "cache"), "prepare_processes": 1, "validation_fraction": 0.2}
    return FilesConfig(root=str(corpus), **(defaults | fields))


def everything(prepared: PreparedData) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(prepared.folder.iterdir()) if p.suffix in (".bin", ".npy") or p.name == "tokenizer.json"}


# what is in it


def test_documents_come_back_from_the_shards_in_order(corpus, monkeypatch):
    monkeypatch.setattr(sources_module, "_PART_BYTES", (500, 500))
    prepared = prepare(config(corpus), BPE)
    names = sorted(p.relative_to(corpus).as_posix() for p in corpus.rglob("*.py"))
    for side in ("train", "validation"):
        expected = [(corpus / n).read_text() for n in names if split(n, 0.2) == side]
        assert list(prepared.texts(side)) == expected
        entry = prepared.manifest.splits[side]
        assert entry.documents == len(expected) == getattr(prepared, side).documents
        assert entry.bytes == sum(len(t.encode()) for t in expected)
        assert entry.tokens == sum(len(ids) for ids in prepared.documents(side))


def test_a_marker_precedes_every_document_and_ends_the_shard(corpus):
    prepared = prepare(config(corpus), BPE)
    (shard,) = prepared.train.shards
    markers = np.flatnonzero(shard.tokens == prepared.vocabulary.end_of_document)
    np.testing.assert_array_equal(markers, shard.offsets)
    assert markers[0] == 0
    assert markers[-1] == len(shard.tokens) - 1
    assert shard.tokens.dtype == np.uint16
    assert not shard.tokens.flags.writeable


def test_large_data_is_cut_into_shards_between_documents(tmp_path):
    writer = ShardWriter(tmp_path, "train", end_of_document=9, dtype=np.dtype("<u4"), shard_tokens=10)
    documents = [np.arange(n) for n in (3, 4, 2, 30, 1)]
    for ids in documents:
        writer.add(ids, len(ids))
    entry = writer.close()
    streams = [np.fromfile(tmp_path / s.file, "<u4").tolist() for s in entry.shards]
    assert streams == [[9, 0, 1, 2, 9, 0, 1, 2, 3, 9], [9, 0, 1, 9], [9, *range(30), 9], [9, 0, 9]]
    assert [s.documents for s in entry.shards] == [2, 1, 1, 1]


def test_text_that_spells_the_marker_opens_no_document(corpus):
    (corpus / "package0" / "module0.py").write_text("a <|endoftext|> b\n" * 3)
    prepared = prepare(config(corpus), BPE)
    assert sum("<|endoftext|>" in t for side in ("train", "validation") for t in prepared.texts(side)) == 1
    (shard,) = prepared.train.shards
    assert np.count_nonzero(shard.tokens == prepared.vocabulary.end_of_document) == prepared.train.documents + 1


def test_the_split_follows_the_name_alone_and_only_grows():
    names = [f"folder/file{i}.py" for i in range(4000)]
    places = np.array([place(n) for n in names])
    assert 0 <= places.min() < places.max() < 1
    assert abs((places < 0.05).mean() - 0.05) < 0.015
    assert abs((places < 0.37).mean() - 0.37) < 0.03
    # measured numbers of the standard library rest on this very split
    import hashlib

    assert [p < 0.05 for p in places] == [int(hashlib.sha1(n.encode()).hexdigest(), 16) % 20 == 0 for n in names]


def test_the_tokenizer_is_trained_on_training_documents_alone(corpus):
    data = config(corpus)
    held_out = next(p for p in sorted(corpus.rglob("*.py")) if split(p.relative_to(corpus).as_posix(), 0.2) == "validation")
    held_out.write_text("zzzyyyxxx " * 500)
    prepared = prepare(data, BPE)
    assert not any(b"zz" in b for b in prepared.vocabulary.token_bytes)


def test_exact_duplicates_are_dropped_once(corpus):
    for i in range(3):
        (corpus / f"copy{i}.py").write_text("the same\n")
    assert prepare(config(corpus), BPE).manifest.duplicates == 2
    kept = prepare(config(corpus, drop_duplicates=False), BPE)
    assert kept.manifest.duplicates == 0
    assert kept.train.documents + kept.validation.documents == 63


def test_length_filters(corpus):
    (corpus / "long.py").write_text("x" * 5000)
    manifest = prepare(config(corpus, max_characters=4000, min_characters=60), BPE).manifest
    assert manifest.skipped["longer than data.max_characters"] == 1
    assert manifest.skipped["shorter than data.min_characters"] > 0


# sources


def test_globs(tmp_path):
    for name in ("a.py", "b.txt", "x/a.py", "x/y/c.py", ".git/d.py", "x/.venv/e.py", "lib/site-packages/f.py", "x/g1.md", "x/g2.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(**fields):
        return [f.name for f in Files(FilesConfig(root=str(tmp_path), **fields))._listing]

    assert names() == ["a.py", "x/a.py", "x/y/c.py"]
    assert names(include=["*.py"]) == ["a.py"]
    assert names(include=["x/*.py", "./b.txt"]) == ["b.txt", "x/a.py"]
    assert names(include=["x/**"], exclude=["**/y/**"]) == ["x/a.py", "x/g1.md", "x/g2.md", "x/.venv/e.py"]
    assert names(include=["**/g[!2].md"]) == ["x/g1.md"]
    assert names(include=["?.txt"]) == ["b.txt"]


def test_the_standard_library_is_cleaned(tmp_path):
    source = Stdlib(StdlibConfig())
    names = [f.name for f in source._listing]
    assert len(names) > 300
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"encodings", "pydoc_data", "idlelib", "lib2to3", "turtledemo", "msilib", "test", "tests", "site-packages"}
    assert any(n.startswith("unittest/") for n in names)
    if sys.version_info[:3] == (3, 11, 7):  # as measured
        prepared = prepare(StdlibConfig(cache_dir=str(tmp_path)), ByteConfig(num_sentinels=0))
        assert prepared.train.documents + prepared.validation.documents == 452
        assert round((prepared.train.bytes + prepared.validation.bytes) / 1e6, 2) == 8.83


def test_repeated_words():
    source = Repeat(RepeatConfig(num_documents=300, word_length=8, seed=5))
    documents = [d for part in source.parts() for d in source.read(part)]
    assert len(documents) == len({d.name for d in documents}) == 300
    for document in documents:
        before, repeated, again = document.text.splitlines()
        assert repeated == again != before
        assert len(set(repeated)) == len(set(before)) == 8
    assert [d.text for d in source.read(source.parts()[0])] == [d.text for d in documents]
    other = Repeat(RepeatConfig(num_documents=300, word_length=8, seed=6))
    assert next(other.read(other.parts()[0])).text != documents[0].text
    assert other.fingerprint() != source.fingerprint()


# how it is made


def test_the_result_does_not_depend_on_processes(corpus, monkeypatch):
    monkeypatch.setattr(sources_module, "_PART_BYTES", (500, 500))
    one = everything(prepare(config(corpus), BPE))
    two = prepare(config(corpus, prepare_processes=2, cache_dir=str(corpus.parent / "other")), BPE)
    assert len(sources_module.Files(config(corpus)).parts()) > 4
    assert everything(two) == one


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_job_is_raised_here(processes):
    assert sorted(run_jobs(operator.truediv, 12.0, [1, 2, 3, 4], processes=processes)) == [3.0, 4.0, 6.0, 12.0]
    with pytest.raises(ZeroDivisionError):
        list(run_jobs(operator.truediv, 12.0, [1, 2, 0, 4], processes=processes))


def test_a_process_that_dies_is_noticed():
    with pytest.raises(WorkerError, match="ended with status 3"):
        list(run_jobs(operator.call, os._exit, [3, 3], processes=2))


def test_a_second_call_reads_nothing(corpus, monkeypatch):
    first = prepare(config(corpus), BPE)
    monkeypatch.setattr(Files, "read", lambda self, part: pytest.fail("documents were read again"))
    again = prepare(config(corpus, sequence_length=32, validation_sequences=3), BPE)
    assert again.folder == first.folder
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("change", ["file", "tokenizer", "fraction", "filter", "format"])
def test_a_change_is_prepared_anew(corpus, change, monkeypatch):
    first = prepare(config(corpus), BPE)
    data, tokenizer = config(corpus), BPE
    if change == "file":
        (corpus / "package0" / "module0.py").write_text("changed = True\n")
    elif change == "tokenizer":
        tokenizer = BPEConfig(vocab_size=390, num_sentinels=0)
    elif change == "fraction":
        data = config(corpus, validation_fraction=0.4)
    elif change == "filter":
        data = config(corpus, max_characters=100)
    else:
        monkeypatch.setattr(prepare_module, "FORMAT", 99)
    assert prepared_folder(data, tokenizer, data.build_source()) != first.folder


def test_a_failure_leaves_no_folder_and_parts_are_used_again(corpus, monkeypatch):
    monkeypatch.setattr(sources_module, "_PART_BYTES", (500, 500))
    data, read, done = config(corpus), Files.read, []
    parts = Files(data).parts()

    def failing(self, part):
        if part == parts[5]:
            raise RuntimeError("killed")
        return read(self, part)

    tokenizer = ByteConfig(num_sentinels=0)  # not trained: every part is read once
    monkeypatch.setattr(Files, "read", failing)
    with pytest.raises(RuntimeError, match="killed"):
        prepare(data, tokenizer)
    assert not prepared_folder(data, tokenizer, data.build_source()).exists()
    monkeypatch.setattr(Files, "read", lambda self, part: done.append(part) or read(self, part))
    resumed = everything(prepare(data, tokenizer))
    assert done == parts[5:]
    assert resumed == everything(prepare(config(corpus, cache_dir=str(corpus.parent / "unbroken")), tokenizer))
    assert not list(resumed and corpus.parent.glob("cache/*.partial"))


KILLED = """
import sys, time
from heads_lightning.configs.data import FilesConfig
from heads_lightning.configs.tokenizer import ByteConfig
from heads_lightning.data import sources
from heads_lightning.data.prepare import prepare
sources._PART_BYTES = (500, 500)
def progress(stage, done, total):
    print(stage, done, flush=True)
    time.sleep(0.05)
prepare(FilesConfig(root=sys.argv[1], cache_dir=sys.argv[2], validation_fraction=0.2, prepare_processes=2),
        ByteConfig(num_sentinels=0), progress=progress)
"""


def test_a_killed_preparation_goes_on(corpus, monkeypatch):
    monkeypatch.setattr(sources_module, "_PART_BYTES", (500, 500))
    data, tokenizer = config(corpus), ByteConfig(num_sentinels=0)
    command = [sys.executable, "-c", KILLED, str(corpus), data.cache_dir]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "tokens 3" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = prepared_folder(data, tokenizer, data.build_source())
    assert not folder.exists()
    assert len(list(Path(f"{folder}.partial").glob("parts/*.npz"))) >= 3
    resumed = everything(prepare(data, tokenizer))
    assert resumed == everything(prepare(config(corpus, cache_dir=str(corpus.parent / "unbroken")), tokenizer))


def test_two_at_once_make_it_once(corpus, monkeypatch):
    reads, read = [], Files.read

    def slow(self, part):
        reads.append(part)
        time.sleep(0.2)
        return read(self, part)

    monkeypatch.setattr(Files, "read", slow)
    results, stages = [], []
    tokenizer = ByteConfig(num_sentinels=0)
    threads = [
        threading.Thread(target=lambda: results.append(prepare(config(corpus), tokenizer, progress=lambda *p: stages.append(p[0]))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0].folder == results[1].folder
    assert len(reads) == 1
    assert "waiting" in stages


def test_a_tokenizer_is_a_stage_where_one_is_trained(corpus):
    for tokenizer, first in ((BPE, "tokenizer"), (ByteConfig(num_sentinels=0), "tokens")):
        stages = []
        prepare(config(corpus), tokenizer, progress=lambda *p, stages=stages: stages.append(p[0]))
        assert stages[0] == first


# mistakes


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_read_is_named_once(corpus):
    (corpus / "latin.py").write_bytes("caf\xe9".encode("latin-1"))
    (corpus / "empty.py").write_text("")
    with pytest.warns(UserWarning, match=r"left out 1 documents: latin.py \(not UTF-8\)"):
        prepared = prepare(config(corpus), BPE)
    assert prepared.manifest.skipped == {"not UTF-8": 1, "empty": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(config(corpus), BPE)


def test_no_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"data.root=.*nowhere is not a folder") as error:
        prepare(FilesConfig(root=str(tmp_path / "nowhere")), BPE)
    one_line(error)


def test_no_file_matches(corpus):
    with pytest.raises(ConfigError, match=r"no file below .* matches data.include=\[\*.rs\]") as error:
        prepare(config(corpus, include=["*.rs"]), BPE)
    one_line(error)


def test_nothing_usable(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "a.py").write_bytes(b"\xff\xff")
    (root / "b.py").write_text("  \n")
    with (
        pytest.warns(UserWarning, match="left out 1"),
        pytest.raises(ConfigError, match=r"no usable documents .*1 not UTF-8, 1 empty") as error,
    ):
        prepare(config(root), ByteConfig())
    one_line(error)


def test_nothing_held_out_names_the_fraction_that_works(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(4):
        (root / f"f{i}.py").write_text(f"x = {i}\n")
    with pytest.raises(ConfigError, match="holds out none of the 4 documents") as error:
        prepare(config(root, validation_fraction=0.001), ByteConfig())
    fraction = float(one_line(error).split("data.validation_fraction=")[-1].split(" ")[0])
    assert prepare(config(root, validation_fraction=fraction), ByteConfig()).validation.documents == 1


def test_a_single_document(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "a.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has one document"):
        prepare(config(root), ByteConfig())


def test_a_cache_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache_dir=.*choose another folder with data.cache_dir=") as error:
        prepare(config(corpus, cache_dir=str(tmp_path / "file" / "cache")), BPE)
    one_line(error)


def test_a_full_disk(corpus, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(prepare_module, "_write_atomically", full)
    with pytest.raises(ConfigError, match="No space left on device") as error:
        prepare(config(corpus), BPE)
    one_line(error)


@pytest.mark.parametrize("file", ["train-00000.bin", "validation-00000.offsets.npy", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_files_are_named(corpus, file, damage):
    prepared = prepare(config(corpus), BPE)
    path = prepared.folder / file
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(ConfigError, match=f"{file} .*delete the folder .* prepared again") as error:
        _ = prepare(config(corpus), BPE).validation
    one_line(error)


def test_a_changed_byte_is_found_by_verify(corpus):
    prepared = prepare(config(corpus), BPE)
    prepared.verify()
    with open(prepared.folder / "train-00000.bin", "r+b") as file:
        file.seek(11)
        file.write(b"\x00\x01")
    with pytest.raises(ConfigError, match=r"train-00000.bin does not have the contents"):
        PreparedData(prepared.folder).verify()


def test_another_format_is_named(corpus):
    prepared = prepare(config(corpus), BPE)
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    (prepared.folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ConfigError, match="has format 99"):
        PreparedData(prepared.folder)
    assert manifest["format"] == shards_module.FORMAT
