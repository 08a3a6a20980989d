"""Formats of published families: found in a tokenizer, used by training and prompts alike, saved with the tokenizer, never guessed over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from heads_lightning.batch import IGNORE
from heads_lightning.configs.fim_format import FIM_FORMATS, FIMFormat, detect, register_fim_format
from heads_lightning.configs.head import DefaultLMHeadConfig, LMHeadConfig, MLMHeadConfig, NormalizedLMHeadConfig
from heads_lightning.configs.objective import FIMConfig, SPMLayout
from heads_lightning.configs.tokenizer import ByteConfig, HuggingFaceTokenizerConfig
from heads_lightning.data.tokenizer import Tokenizer, saved_fingerprint
from heads_lightning.new_tokens import fill_new_rows, initialise_new_tokens
from heads_lightning.objectives.base import SampleRandom
from heads_lightning.objectives.fim_layout import fim_prompt, invert
from heads_lightning.registry import ConfigError

TEXT = "def add(a, b):\n    return a + b  # naïve\n"


def tokenizer_of(known: FIMFormat, folder) -> Tokenizer:
    """Bytes, and the family's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>", *known.spellings, *([known.end] if known.end else []), *known.marks[:1]])
    inner.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizerConfig(path=str(folder)).build([])


@pytest.mark.parametrize("name", FIM_FORMATS)
def test_a_family_is_found_used_and_saved(name, tmp_path):
    known = FIM_FORMATS[name]
    tokenizer = tokenizer_of(known, tmp_path)
    v = tokenizer.vocabulary
    assert v.fim_format == name
    ids = {"prefix": v.fim_prefix, "suffix": v.fim_suffix, "middle": v.fim_middle, "end": v.fim_end}
    spelled = {role: None if token is None else tokenizer.inner.id_to_token(token) for role, token in ids.items()}
    assert spelled == {"prefix": known.prefix, "suffix": known.suffix, "middle": known.middle, "end": known.end or "<|endoftext|>"}
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").vocabulary.fim_format == name
    assert saved_fingerprint(tmp_path / "saved") == tokenizer.fingerprint

    objective = FIMConfig(rate=1.0).build(v)
    layouts = objective.layouts
    assert layouts.format == name
    assert layouts.trained == [layout for layout, has in (("psm", known.psm), ("spm", known.spm)) if has]
    assert known.spm is None or layouts.spm == known.spm
    self_consistent(objective, v)


def self_consistent(objective, v):
    """Every example is the prompt of its layout, its middle and the end marker."""
    ids = np.array([v.end_of_document, *v.encode(TEXT)] * 3 + [v.end_of_document])
    length, seen = 200, set()
    examples = objective.examples(np.tile(ids, (60, 1)), SampleRandom(0, 0, np.arange(60)), length)
    for b in range(60):
        for number in range(examples.segments_BS[b].max() + 1):
            piece = examples.tokens_BS[b][examples.segments_BS[b] == number]
            labels, part = (x[b][examples.segments_BS[b] == number] for x in (examples.labels_BS, examples.part_BS))
            assert piece[-1] == v.fim_end
            assert labels[-1] == IGNORE
            assert labels[-2] == v.fim_end
            source = invert(piece, v)
            assert b"".join(v.token_bytes[i] for i in source).decode() == TEXT
            middle = piece[np.flatnonzero(part)[0] + 1 : -1]
            rest = source[1:].tolist()  # prefix, middle, suffix
            cut = next(k for k in range(len(rest) - len(middle) + 1) if is_layout(piece, rest, k, len(middle), objective.layouts, v, seen))
            assert rest[cut : cut + len(middle)] == middle.tolist()
    assert seen == set(objective.layouts.trained)


def is_layout(piece, rest, start, length, layouts, v, seen) -> bool:
    for layout in layouts.trained:
        prompt = fim_prompt(np.array(rest[:start], int), np.array(rest[start + length :], int), v, layout, layouts.spm)
        if np.array_equal(np.concatenate([prompt, rest[start : start + length], [v.fim_end]]), piece):
            seen.add(layout)
            return True
    return False


def test_what_the_objective_says_must_fit_the_tokenizer(tmp_path):
    own = ByteConfig().build([]).vocabulary
    with pytest.raises(ConfigError, match=r"format=starcoder does not fit the tokenizer.*use objective.format=own"):
        FIMConfig(format="starcoder").build(own)
    with pytest.raises(ConfigError, match="Did you mean 'starcoder'"):
        FIMConfig(format="starcode")
    with pytest.raises(ConfigError, match="suffix_first, spm_rate=1 alone"):
        FIMConfig(spm_rate=0.5).build(tokenizer_of(FIM_FORMATS["codestral"], tmp_path).vocabulary)


def test_families_that_share_all_tokens_are_told_apart_by_the_config(tmp_path):
    v = tokenizer_of(FIM_FORMATS["qwen_coder"], tmp_path).vocabulary
    assert FIMConfig(format="olmo").build(v).layouts.spm == SPMLayout.variant1


def test_a_plugin_adds_a_family(monkeypatch):
    monkeypatch.setattr("heads_lightning.configs.fim_format.FIM_FORMATS", dict(FIM_FORMATS))
    from heads_lightning.configs import fim_format

    fim_format.register_fim_format(FIMFormat("mine", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", marks=("<mine>",)))
    assert fim_format.detect(["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<mine>"]).name == "mine"
    assert detect(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]).name == "starcoder"
    with pytest.raises(ConfigError, match="registered already"):
        register_fim_format(FIMFormat("mine", "a", "b", "c"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_of_the_old_ones_and_a_little_noise(dtype):
    matrix = (torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 2 + 5).to(dtype)
    before, new = matrix.clone(), [7, 499]
    matrix[new] = float("nan")
    fill_new_rows(matrix, new, generator=torch.Generator().manual_seed(1))
    old = torch.ones(500, dtype=torch.bool)
    old[new] = False
    assert torch.equal(matrix[old], before[old])
    away = matrix[new].float() - before[old].float().mean(dim=0)
    assert away.abs().max() < 0.01 * 2 * 4 + 0.04 * (dtype == torch.bfloat16)
    assert dtype == torch.bfloat16 or not torch.equal(matrix[7], matrix[499])
    with pytest.raises(ValueError, match="there must be new ones"):
        fill_new_rows(matrix, [])


@pytest.mark.parametrize(
    "config", [DefaultLMHeadConfig(), DefaultLMHeadConfig(tie_embeddings=True), NormalizedLMHeadConfig(), MLMHeadConfig()]
)
def test_both_matrices_get_new_rows(config: LMHeadConfig):
    embedding = torch.nn.Embedding(40, 8)
    tied = dataclasses.asdict(config)["tie_embeddings"]
    head = config.build(d_model=8, vocab_size=40, embedding=embedding if tied else None)
    before = [embedding.weight.detach().clone(), head.w_out.weight if tied else head.w_out.weight.detach().clone()]
    initialise_new_tokens(embedding, head, [38, 39], generator=torch.Generator().manual_seed(0))
    matrices = [embedding.weight] if tied else [embedding.weight, head.w_out.weight]
    for matrix, old in zip(matrices, before, strict=False):
        assert torch.equal(matrix[:38], old[:38])
        torch.testing.assert_close(matrix[38:], old[:38].mean(dim=0).expand(2, -1), atol=0.01 * 4 * float(old.std()), rtol=0)
        assert not torch.equal(matrix[38:], old[38:])
