"""Tokenizers: what goes in comes out, special tokens never match text, roles are found in tokenizers of others."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from heads_lightning.configs.tokenizer import BPEConfig, ByteConfig, HuggingFaceTokenizerConfig
from heads_lightning.data.tokenizer import Tokenizer, saved_fingerprint
from heads_lightning.registry import ConfigError

TEXTS = ["def add(a, b):\n    return a + b\n", "naïve café — 你好 🙂\r\n\t<|endoftext|> literally", "<|fim_prefix|>x<|extra_id_0|>"] * 3
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|mask|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_end|>"]


@pytest.fixture(scope="module", params=["bpe", "byte"])
def tokenizer(request) -> Tokenizer:
    config = BPEConfig(vocab_size=400, num_sentinels=10) if request.param == "bpe" else ByteConfig(num_sentinels=10)
    return config.build(TEXTS)


@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*SPECIAL, "<|extra_id_3|>", " ", "é", "\n"]), max_size=6).map("".join))
@settings(max_examples=150, deadline=None)
def test_text_comes_back_and_is_never_special(tokenizer: Tokenizer, text: str):
    vocabulary = tokenizer.vocabulary
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert not vocabulary.special_V[ids].any()
    assert tokenizer.decode(ids) == text
    assert b"".join(vocabulary.token_bytes[i] for i in ids) == text.encode()
    assert vocabulary.encode(text) == ids.tolist()


def test_special_tokens_take_the_first_ids(tokenizer: Tokenizer):
    v = tokenizer.vocabulary
    assert (v.end_of_document, v.padding, v.mask) == (0, 1, 2)
    assert (v.fim_prefix, v.fim_suffix, v.fim_middle, v.fim_end) == (3, 4, 5, 6)
    assert v.sentinels == tuple(range(7, 17))
    assert np.flatnonzero(v.special_V).tolist() == list(range(17))
    assert v.size == len(v.token_bytes) == len(v.special_V) == len(v.word_start_V)
    assert {b for b in v.token_bytes if len(b) == 1} == {bytes([i]) for i in range(256)}


def test_decoding_shows_or_skips_special_tokens(tokenizer: Tokenizer):
    ids = [0, *tokenizer.encode("hé"), 6]
    assert tokenizer.decode(ids) == "hé"
    assert tokenizer.decode(ids, show_special=True) == "<|endoftext|>hé<|fim_end|>"
    assert tokenizer.decode(tokenizer.encode("ń")[:1]) == "\ufffd"  # half a character


def test_words_start_at_white_space_and_punctuation(tokenizer: Tokenizer):
    v = tokenizer.vocabulary
    starts = {v.token_bytes[i]: bool(v.word_start_V[i]) for i in range(v.size)}
    assert starts[b" "]
    assert starts[b"\n"]
    assert starts[b"("]
    assert not starts[b"a"]
    assert not starts[b"_"]
    assert not starts[b"7"]
    assert not starts["é".encode()[:1]]
    assert not v.word_start_V[: len(SPECIAL)].any()


def test_saving_keeps_ids_and_fingerprint(tokenizer: Tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint == saved_fingerprint(tmp_path)
    assert again.roles == tokenizer.roles
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_transformers_reads_a_saved_tokenizer(tokenizer: Tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = TEXTS[0]
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).tolist()
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (0, 1, 2)


def test_training_is_deterministic():
    first, second = (BPEConfig(vocab_size=275, num_sentinels=0).build(iter(TEXTS)) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != BPEConfig(vocab_size=274, num_sentinels=0).build(TEXTS).fingerprint


def test_bytes_take_the_fast_path_with_the_same_ids():
    tokenizer = ByteConfig().build([])
    assert tokenizer._byte_ids is not None
    for text in TEXTS:
        slow = tokenizer.inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == slow


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size=300 .*363 or more"):
        BPEConfig(vocab_size=300)


# tokenizers of others


def byte_level(*special: AddedToken | str) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    for token in special:
        (inner.add_special_tokens if isinstance(token, str) else inner.add_tokens)([token])
    return inner


def load(tmp_path, inner: tokenizers.Tokenizer, named: dict | None = None, num_sentinels: int = 2) -> Tokenizer:
    inner.save(str(tmp_path / "tokenizer.json"))
    if named is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    return HuggingFaceTokenizerConfig(path=str(tmp_path), num_sentinels=num_sentinels).build([])


@pytest.mark.parametrize(
    ("spellings", "end"),
    [
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<|endoftext|>"),
        (("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), "<|endoftext|>"),
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "<|endoftext|>"),
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "<|endoftext|>"),
        (("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"), "▁<EOT>"),
    ],
)
def test_infilling_tokens_of_others_are_found(tmp_path, spellings, end):
    tokenizer = load(tmp_path, byte_level("<|endoftext|>", *spellings))
    v = tokenizer.vocabulary
    assert (v.fim_prefix, v.fim_suffix, v.fim_middle) == (257, 258, 259)
    assert v.fim_end == tokenizer.inner.token_to_id(end)
    assert v.end_of_document == 256
    assert not v.special_V[tokenizer.encode(f"a{spellings[0]}b<|endoftext|>")].any()


def test_infilling_tokens_marked_as_text_become_special(tmp_path):  # Qwen2.5-Coder marks them special=false
    marked = [AddedToken(f"<|fim_{role}|>", special=False) for role in ("prefix", "suffix", "middle")]
    tokenizer = load(tmp_path, byte_level("<|endoftext|>", *marked))
    v = tokenizer.vocabulary
    assert v.fim_prefix == 257
    assert v.special_V[257]
    assert 257 not in tokenizer.encode("x<|fim_prefix|>y")


def test_missing_special_tokens_are_appended_and_other_ids_stay(tmp_path):
    tokenizer = load(tmp_path, byte_level(AddedToken("    ", special=False)), num_sentinels=2)
    v = tokenizer.vocabulary
    assert v.end_of_document == 257
    assert v.size == 257 + 7 + 2
    assert v.token_bytes[256] == b"    "  # an added token that is text
    assert not v.special_V[256]
    assert tokenizer.encode("    ").tolist() == [256]


def test_declared_end_and_padding_win(tmp_path):
    named = {"eos_token": {"content": "<stop>"}, "pad_token": "<stop>"}
    v = load(tmp_path, byte_level("</s>", "<stop>"), named).vocabulary
    assert v.end_of_document == 257
    assert v.padding != v.end_of_document


def test_sentinels_of_t5_are_found(tmp_path):
    v = load(tmp_path, byte_level("</s>", "<extra_id_1>", "<extra_id_0>"), num_sentinels=2).vocabulary
    assert v.sentinels == (258, 257)


def test_nothing_is_added_cut_or_padded(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {entry: i for i, entry in enumerate([*alphabet, "lo", "</s>"])}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("l", "o")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["</s>"])
    inner.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 257)])
    inner.enable_truncation(3)
    inner.enable_padding(length=20)
    tokenizer = load(tmp_path, inner)
    assert tokenizer._byte_ids is None
    assert len(tokenizer.encode("hello")) == 4


def test_sentencepiece_style_entries_become_bytes(tmp_path):
    vocab = {"<unk>": 0, "▁hi": 1, "<0xC3>": 2, "<0xA9>": 3}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    v = load(tmp_path, inner).vocabulary
    assert v.token_bytes[1:4] == (b" hi", b"\xc3", b"\xa9")


def test_a_tokenizer_of_ours_keeps_its_roles(tmp_path):
    ours = ByteConfig(num_sentinels=3).build([])
    ours.save(tmp_path)
    assert HuggingFaceTokenizerConfig(path=str(tmp_path)).build([]).fingerprint == ours.fingerprint


@pytest.mark.parametrize("path", ["nowhere", "???"])
def test_a_missing_file_is_one_line(path):
    with pytest.raises(ConfigError, match=r"tokenizer.path=") as error:
        HuggingFaceTokenizerConfig(path=path).build([])
    assert "\n" not in str(error.value)


def test_a_broken_file_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read as a tokenizer.json"):
        HuggingFaceTokenizerConfig(path=str(tmp_path)).build([])


def test_identity_follows_the_contents_of_the_file(tmp_path):
    byte_level("<a>").save(str(tmp_path / "tokenizer.json"))
    config = HuggingFaceTokenizerConfig(path=str(tmp_path))
    before = config.identity()
    byte_level("<b>").save(str(tmp_path / "tokenizer.json"))
    assert config.identity() != before


def sentencepiece_style() -> tokenizers.Tokenizer:
    """As Llama 2 and Code Llama: a space before every text, written ▁; what has no entry is spelt in bytes."""
    from tokenizers import normalizers

    entries = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)), "▁x", "def", "▁def"]
    merges = [("▁", "x"), ("d", "e"), ("de", "f"), ("▁", "def")]
    entries += ["de"]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={e: i for i, e in enumerate(entries)}, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(["</s>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"])
    return inner


def test_a_text_inside_a_document_has_no_space_before_it(tmp_path):
    """Code Llama's rule for suffix and middle: as they were tokenised in the whole document."""
    tokenizer = load(tmp_path, sentencepiece_style())
    spelled = tokenizer.vocabulary.token_bytes

    def text(ids) -> bytes:
        return b"".join(spelled[i] for i in ids.tolist())

    for inside in ("def f", "x", " x = 1", "\nx", "é", "☺"):
        assert text(tokenizer.encode(inside)) == f" {inside}".encode()
        assert text(tokenizer.encode_inside(inside)) == inside.encode()
        whole = tokenizer.encode("a(" + inside)
        assert whole.tolist() == [*tokenizer.encode("a("), *tokenizer.encode_inside(inside)]
    assert tokenizer.encode_inside("").tolist() == []
    byte = ByteConfig().build([])
    assert byte.encode_inside("x y").tolist() == byte.encode("x y").tolist()


def test_an_infilling_prompt_of_code_llama(tmp_path, tiny):
    from bigram import bigram_model

    from heads_lightning.evaluation.protocol import HiddenLine
    from heads_lightning.evaluation.scoring import _prompt

    load(tmp_path, sentencepiece_style())
    overrides = [o for o in tiny if not o.startswith("tokenizer.")]
    model, _ = bigram_model([*overrides, "tokenizer=huggingface", f"tokenizer.path={tmp_path}", "objective=fim", "objective.cut=token"])
    v = model.tokenizer.vocabulary
    assert v.fim_format == "code_llama"
    question = HiddenLine("def f", "", "x = 1", "", "", begins_document=True)
    shown = [model.tokenizer.inner.id_to_token(int(i)) for i in _prompt(model, question, with_suffix=True, layout="psm")]
    assert shown == ["</s>", "▁<PRE>", "▁def", "▁", "f", "▁<SUF>", "x", "▁", "=", "▁", "1", "▁<MID>"]
    inside = [*_prompt(model, question._replace(begins_document=False), with_suffix=True, layout="psm")]
    assert [model.tokenizer.inner.id_to_token(int(i)) for i in inside][:2] == ["▁<PRE>", "def"]
