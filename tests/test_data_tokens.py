"""Files of ids made by others: documents, whatever the layout and wherever the parts begin; wrong types and tokenizers are refused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from heads_lightning.configs.data import TokenDType, TokensConfig
from heads_lightning.configs.tokenizer import BPEConfig, ByteConfig
from heads_lightning.data import tokens as tokens_module
from heads_lightning.data.prepare import prepare
from heads_lightning.data.tokens import Tokens
from heads_lightning.registry import ConfigError

SEPARATOR = 0
TOKENIZER = ByteConfig(num_sentinels=0)
FIRST = 7  # bytes begin after the special tokens
TEXTS = [f"document {i}: " + "abc é " * (i % 7) for i in range(60)]
DOCUMENTS = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) + FIRST for text in TEXTS]


def write_raw(path, dtype=np.uint16, *, ends=True):
    pieces = [np.concatenate([d, [SEPARATOR]] if ends else [[SEPARATOR], d]) for d in DOCUMENTS]
    np.concatenate(pieces).astype(dtype).tofile(path)


def write_numpy(path):
    np.save(path, np.concatenate([np.concatenate([d, [SEPARATOR]]) for d in DOCUMENTS]).astype(np.uint32))


def write_llm_c(path):
    header = np.zeros(256, np.int32)
    header[:2] = 20240520, 1
    ids = np.concatenate([np.concatenate([[SEPARATOR], d]) for d in DOCUMENTS]).astype(np.uint16)
    path.write_bytes(header.tobytes() + ids.tobytes())


def write_megatron(path):
    """Each document two sequences; with the end-of-document id at the end of every second one."""
    halves, first = [], [0]
    for i, d in enumerate(DOCUMENTS):
        whole = np.concatenate([d, [SEPARATOR]]) if i % 2 else d
        halves += [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
        first.append(len(halves))
    lengths = np.array([len(h) for h in halves], np.int32)
    np.concatenate(halves).astype(np.uint16).tofile(path)
    pointers = (np.cumsum(lengths) - lengths).astype(np.int64) * 2
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(first))
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + np.array(first, np.int64).tobytes())


LAYOUTS = {
    "olmo": ("a.npy", write_raw),
    "nanogpt": ("a.bin", lambda path: write_raw(path, ends=False)),
    "numpy": ("a.npy", write_numpy),
    "llm.c": ("a.bin", write_llm_c),
    "megatron": ("a.bin", write_megatron),
}


@pytest.mark.parametrize("part_tokens", [1, 37, 1 << 23])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_document_comes_once(tmp_path, monkeypatch, layout, part_tokens):
    name, write = LAYOUTS[layout]
    write(tmp_path / name)
    monkeypatch.setattr(tokens_module, "PART_TOKENS", part_tokens)
    source = Tokens(TokensConfig(root=str(tmp_path), separator=SEPARATOR))
    found = [document for part in source.parts() for document in source.read(part)]
    assert [d.ids.tolist() for d in found] == [d.tolist() for d in DOCUMENTS]
    assert len({d.name for d in found}) == len(DOCUMENTS)
    assert all(d.text == "" and not d.problem for d in found)


def test_prepared_like_text(tmp_path):
    """The shards hold what tokenising the text would have given: same split rule, bytes, and removal of duplicates."""
    write_raw(tmp_path / "a.bin")
    write_raw(tmp_path / "b.bin")
    config = TokensConfig(root=str(tmp_path), cache_dir=str(tmp_path / "cache"), validation_fraction=0.3, prepare_processes=1)
    prepared = prepare(config, TOKENIZER)
    assert prepared.manifest.duplicates == 60
    assert sorted([*prepared.texts("train"), *prepared.texts("validation")]) == sorted(TEXTS)
    assert prepared.train.bytes + prepared.validation.bytes == sum(len(t.encode()) for t in TEXTS)
    shard = prepared.train.shards[0]
    assert (shard.tokens[shard.offsets] == prepared.vocabulary.end_of_document).all()


def refuse(config, tokenizer, message):
    with pytest.raises(ConfigError, match=message) as error:
        prepare(config, tokenizer)
    assert "\n" not in str(error.value)


def test_refusals(tmp_path):
    cache = str(tmp_path / "cache")
    write_raw(tmp_path / "a.bin", np.uint32)
    refuse(TokensConfig(root=str(tmp_path), cache_dir=cache), BPEConfig(), "token ids already.*tokenizer=huggingface")
    np.full(100, 40_000, np.uint16).tofile(tmp_path / "a.bin")
    refuse(TokensConfig(root=str(tmp_path), cache_dir=cache, prepare_processes=1), TOKENIZER, "holds id 40000, and the tokenizer has 263")
    (tmp_path / "a.bin").write_bytes(b"123")
    refuse(TokensConfig(root=str(tmp_path), cache_dir=cache), TOKENIZER, "no whole number of uint16; set data.dtype")
    (tmp_path / "a.idx").write_bytes(b"something else entirely")
    refuse(TokensConfig(root=str(tmp_path), cache_dir=cache), TOKENIZER, "no Megatron index")
    (tmp_path / "a.idx").unlink()
    np.save(tmp_path / "a.npy", np.ones((3, 3)))
    config = TokensConfig(root=str(tmp_path), cache_dir=cache, include=["*.npy"], dtype=TokenDType.int64)
    refuse(config, TOKENIZER, "array of float64 with shape")
    with pytest.raises(ConfigError, match="leave them out"):
        TokensConfig(max_characters=5)


def test_a_source_of_the_datasets_library(tmp_path):
    """A saved folder, in parts by rows; rows without text are counted."""
    datasets = pytest.importorskip("datasets")
    from heads_lightning.configs.data import HuggingFaceDataConfig
    from heads_lightning.data.huggingface import HuggingFace

    datasets.Dataset.from_dict({"text": [*TEXTS, None], "n": list(range(61))}).save_to_disk(str(tmp_path / "set"))
    source = HuggingFace(HuggingFaceDataConfig(path=str(tmp_path / "set")))
    found = [document for part in source.parts() for document in source.read(part)]
    assert [d.text for d in found[:-1]] == TEXTS
    assert found[-1].problem == "no text under 'text'"
    assert found[3].name == "train:3"
    with pytest.raises(ConfigError, match="no column of"):
        HuggingFace(HuggingFaceDataConfig(path=str(tmp_path / "set"), text_field="body")).parts()
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS), encoding="utf-8")
    streamed = HuggingFace(HuggingFaceDataConfig(path=str(tmp_path / "lines"), streaming=True))
    assert [d.text for part in streamed.parts() for d in streamed.read(part)] == TEXTS
    with pytest.raises(ConfigError, match="cannot be read"):
        HuggingFace(HuggingFaceDataConfig(path=str(tmp_path / "lines"), split="other")).parts()


def test_without_the_library_the_extra_is_named(monkeypatch):
    import sys

    from heads_lightning.configs.data import HuggingFaceDataConfig

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'heads-lightning\[datasets\]'"):
        HuggingFaceDataConfig(path="somewhere").build_source()
    with pytest.raises(ConfigError, match=r"data\.path="):
        HuggingFaceDataConfig().build_source()
