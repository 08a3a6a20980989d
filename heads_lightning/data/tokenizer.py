"""Text to ids and back: one class around the `tokenizers` library, whatever the tokenizer was made from.

Choices. Special tokens never match inside text: a document that spells `<|endoftext|>` is encoded letter by letter, so that no text can
end a document or open a middle. What each special token is for (its role) is kept beside the tokenizer, because tokenizers of others
spell the roles in a dozen ways. Encoding adds nothing: markers are put between documents by the shards, sentinels by objectives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from heads_lightning.configs.fim_format import detect
from heads_lightning.objectives.base import Vocabulary
from heads_lightning.registry import ConfigError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_ROLES_KEY, _ADDED_KEY = "heads_lightning_roles", "heads_lightning_added"
_NOT_TOKENS = ("sentinels", "fim_format")
"""Fields of Roles that are not the spelling of one token."""


@dataclass(frozen=True)
class Roles:
    """Spelling of the special token of each role; None where there is none. Fields as in objectives.base.Vocabulary."""

    end_of_document: str = "<|endoftext|>"
    padding: str = "<|pad|>"
    mask: str | None = "<|mask|>"
    fim_prefix: str | None = "<|fim_prefix|>"
    fim_suffix: str | None = "<|fim_suffix|>"
    fim_middle: str | None = "<|fim_middle|>"
    fim_end: str | None = "<|fim_end|>"
    sentinels: tuple[str, ...] = ()
    fim_format: str = "own"
    """Family of the infilling tokens (configs.fim_format)."""

    @property
    def spellings(self) -> list[str]:
        """Every special token, in the order of their ids where the tokenizer is our own."""
        named = [v for k, v in asdict(self).items() if k not in _NOT_TOKENS and v is not None]
        return list(dict.fromkeys([*named, *self.sentinels]))  # a token may have two roles


def own_roles(num_sentinels: int) -> Roles:
    """Spellings used where a tokenizer does not bring its own."""
    return Roles(sentinels=tuple(f"<|extra_id_{i}|>" for i in range(num_sentinels)))


_END_SPELLINGS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|eos|>", "[SEP]")
_PADDING_SPELLINGS = ("<|pad|>", "<pad>", "[PAD]", "<|fim_pad|>", "<fim_pad>", "<|finetune_right_pad_id|>")
_MASK_SPELLINGS = ("<|mask|>", "<mask>", "[MASK]")
_GUARDS = ("☺", "\x02", "¶")
"""Characters that hardly a vocabulary merges with what follows."""


class Tokenizer:
    """Text to ids and back.

    Args:
        inner: of the `tokenizers` library; every spelling of `roles` must have an id in it.
        roles: which special token is for what.
        added: spellings of the special tokens that whoever made the tokenizer did not know: no model has met them.
    """

    def __init__(self, inner: tokenizers.Tokenizer, roles: Roles, added: Sequence[str] = ()) -> None:
        inner.encode_special_tokens = True  # as text, that is
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.roles = roles
        self.added = tuple(added)
        missing = [s for s in roles.spellings if inner.token_to_id(s) is None]
        assert not missing, f"special tokens without an id: {missing}"

    # text and ids

    def encode(self, text: str) -> np.ndarray:
        """int64 [number of tokens]: the ids of a text, nothing added."""
        return self.encode_batch([text])[0]

    def encode_inside(self, text: str) -> np.ndarray:
        """int64 [number of tokens]: the ids of a text that goes on from another one.

        SentencePiece puts a space before every text that it is given; inside a document none is there. (Code Llama, arXiv 2308.12950,
        leaves it out before suffix and middle.)
        """
        if not text or not self._opens_with_space:
            return self.encode(text)
        for guard in _GUARDS:  # a token that merges with nothing takes the space, and is cut off
            opening, ids = self.encode(guard), self.encode(guard + text)
            if np.array_equal(ids[: len(opening)], opening):
                return ids[len(opening) :]
        return self.encode(text)

    @cached_property
    def _opens_with_space(self) -> bool:
        texts = ("x", f"{_GUARDS[0]}x")
        spelled = [b"".join(self.vocabulary.token_bytes[token] for token in self.encode(text).tolist()) for text in texts]
        return spelled == [f" {text}".encode() for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, on all threads unless TOKENIZERS_PARALLELISM=false."""
        if self._byte_ids is not None:  # a table look-up, some hundred times as fast as merging nothing
            return [self._byte_ids[np.frombuffer(text.encode("utf-8"), np.uint8)] for text in texts]
        encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def _encode_one(self, text: str) -> list[int]:
        """Ids of a short text, several times as fast as a batch of one."""
        return self.encode(text).tolist() if self._byte_ids is not None else self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, show_special: bool = False) -> str:
        """Text of ids; special tokens are spelled out or left out. Broken UTF-8 becomes U+FFFD."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=not show_special)

    # identity

    @property
    def fingerprint(self) -> str:
        """sha256 of the serialised tokenizer and its roles: equal exactly when both encode alike."""
        return _fingerprint(self.inner.to_str(pretty=True), self.roles)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder; transformers' AutoTokenizer reads them too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        roles = self.roles
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": roles.end_of_document,
            "pad_token": roles.padding,
            "clean_up_tokenization_spaces": False,
            _ROLES_KEY: asdict(roles),
            _ADDED_KEY: self.added,
        }
        if roles.mask is not None:
            config["mask_token"] = roles.mask
        (folder / TOKENIZER_FILE).write_text(self.inner.to_str(pretty=True), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read what `save` wrote."""
        folder = Path(folder)
        added = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get(_ADDED_KEY, ())
        return cls(_read(folder / TOKENIZER_FILE), _saved_roles(folder), added)

    # what objectives see

    @property
    def size(self) -> int:
        """Every id is below it; ids without a token, if there are any, count too."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What objectives need to know."""
        token_bytes = self._token_bytes()
        roles = {k: None if v is None else self.inner.token_to_id(v) for k, v in asdict(self.roles).items() if k not in _NOT_TOKENS}
        return Vocabulary(
            size=self.size,
            fim_format=self.roles.fim_format,
            **roles,  # pyright: ignore[reportArgumentType]
            sentinels=tuple(self.inner.token_to_id(s) for s in self.roles.sentinels),  # pyright: ignore[reportArgumentType]
            added=tuple(self.inner.token_to_id(s) for s in self.added),  # pyright: ignore[reportArgumentType]
            special_V=np.array([not b for b in token_bytes]),
            token_bytes=token_bytes,
            word_start_V=np.array([b[:1] in _WORD_BREAKS for b in token_bytes]),
            encode=self._encode_one,
        )

    def _token_bytes(self) -> tuple[bytes, ...]:
        """Bytes that each id stands for in running text; none for special tokens and for ids without a token."""
        added = self.inner.get_added_tokens_decoder()
        spell = _spelling(json.loads(self.inner.to_str()))
        result = [b""] * self.size
        for token, index in self.inner.get_vocab(with_added_tokens=True).items():
            known = added.get(index)
            result[index] = spell(token) if known is None else b"" if known.special else known.content.encode("utf-8")
        return tuple(result)

    @cached_property
    def _byte_ids(self) -> np.ndarray | None:
        """int64 [256]: the id of each byte, if nothing but bytes is ever encoded."""
        model = self.inner.model
        if not isinstance(model, models.BPE) or len(self.roles.spellings) + 256 != self.size or self.inner.normalizer is not None:
            return None
        ids = [self.inner.token_to_id(character) for character in _BYTE_CHARACTERS]
        return None if None in ids else np.array(ids, np.int64)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2): itself where it is visible, else from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_BYTE_CHARACTERS)}
_WORD_BREAKS = frozenset(bytes([b]) for b in range(128) if not (chr(b).isalnum() or chr(b) == "_"))
"""White space and ASCII punctuation. Bytes past 127 are inside characters: they continue a word."""


def _spelling(serialised: dict[str, Any]) -> Any:
    """How this tokenizer writes bytes in its vocabulary: a function from an entry to its bytes."""
    described = json.dumps([serialised["decoder"], serialised["pre_tokenizer"]])
    if '"ByteLevel"' in described:
        return lambda token: bytes(_BYTE_OF_CHARACTER[c] for c in token if c in _BYTE_OF_CHARACTER)
    if serialised["model"]["type"] == "WordPiece":  # a space is implied before every entry that does not continue a word
        return lambda token: token[2:].encode("utf-8") if token.startswith("##") else f" {token}".encode()
    return _sentencepiece_bytes


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode("utf-8")


def _fingerprint(serialised: str, roles: Roles) -> str:
    # the order of infilling tokens changes no ids
    spelled = {k: v for k, v in asdict(roles).items() if k != "fim_format"}
    return hashlib.sha256((serialised + json.dumps(spelled, sort_keys=True)).encode("utf-8")).hexdigest()


def saved_fingerprint(folder: Path) -> str:
    """Fingerprint of the tokenizer saved in a folder, without building it."""
    return _fingerprint((folder / TOKENIZER_FILE).read_text(encoding="utf-8"), _saved_roles(folder))


def _saved_roles(folder: Path) -> Roles:
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))[_ROLES_KEY]
    return Roles(**(config | {"sentinels": tuple(config["sentinels"])}))


def _read(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file} cannot be read as a tokenizer.json ({error}); give a file written by the tokenizers library") from None


# the ways to get one


def train_bpe(texts: Iterable[str], *, vocab_size: int, num_sentinels: int) -> Tokenizer:
    """A byte-level BPE learned from texts. Special tokens take the first ids; every byte has an entry, so nothing is unknown."""
    roles = own_roles(num_sentinels)
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocab_size,
        special_tokens=[_special(s) for s in roles.spellings],
        initial_alphabet=sorted(_BYTE_CHARACTERS),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, roles)


def byte_tokenizer(*, num_sentinels: int) -> Tokenizer:
    """One token per byte: special tokens first, then bytes 0 to 255 in order."""
    roles = own_roles(num_sentinels)
    entries = [*roles.spellings, *_BYTE_CHARACTERS]
    inner = _byte_level(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[]))
    inner.add_special_tokens([_special(s) for s in roles.spellings])
    return Tokenizer(inner, roles)


def from_huggingface(file: Path, *, num_sentinels: int) -> Tokenizer:
    """A tokenizer.json of others: its special tokens are recognised, those it lacks are added after its own."""
    inner = _read(file)
    config = file.parent / CONFIG_FILE
    named = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if _ROLES_KEY in named:  # one of ours: the model that comes with it has met every token
        return Tokenizer(inner, _saved_roles(file.parent))
    theirs = inner.get_vocab(with_added_tokens=True)
    roles = _recognise(theirs, named, num_sentinels)
    # also for tokens that exist: some mark their infilling tokens as ordinary text, and ordinary text they would match
    inner.add_special_tokens([_special(s) for s in roles.spellings])
    return Tokenizer(inner, roles, [s for s in roles.spellings if s not in theirs])


def _recognise(vocabulary: dict[str, int], named: dict[str, Any], num_sentinels: int) -> Roles:
    """Roles by what tokenizer_config.json names, then by common spellings, then our own."""
    own = own_roles(num_sentinels)

    def find(key: str, spellings: tuple[str, ...], default: str) -> str:
        declared = named.get(key)
        declared = declared.get("content") if isinstance(declared, dict) else declared
        return next((s for s in (declared, *spellings) if s in vocabulary), default)

    end = find("eos_token", _END_SPELLINGS, own.end_of_document)
    padding = find("pad_token", _PADDING_SPELLINGS, own.padding)
    if padding == end:  # padding is told apart by its segment, but an end-of-document id must mean what it says
        padding = next((s for s in _PADDING_SPELLINGS if s in vocabulary), own.padding)
    roles = replace(own, end_of_document=end, padding=padding, mask=find("mask_token", _MASK_SPELLINGS, str(own.mask)))
    if "<extra_id_0>" in vocabulary:  # T5
        theirs = (f"<extra_id_{i}>" for i in range(num_sentinels))
        roles = replace(roles, sentinels=tuple(s if s in vocabulary else o for s, o in zip(theirs, own.sentinels, strict=True)))
    known = detect(vocabulary)
    if known is None:
        return roles
    spelled = {"fim_prefix": known.prefix, "fim_suffix": known.suffix, "fim_middle": known.middle, "fim_end": known.end or end}
    return replace(roles, **spelled, fim_format=known.name)


def _byte_level(model: Any) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return inner


def _special(spelling: str) -> AddedToken:
    return AddedToken(spelling, special=True, normalized=False)
