"""BiGS behind Hugging Face's interface: published names, Auto classes, saving, masks, generate()."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from heads_lightning import BiGSConfig, BiGSForCausalLM, BiGSForMaskedLM, BiGSModel
from heads_lightning.backbones.bigs import BiGS
from heads_lightning.batch import Attention
from heads_lightning.models.bigs import ours_from_published
from heads_lightning.testing.backbones import batch_of

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_ssm": 8, "max_position_embeddings": 64,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def build(cls: Any = BiGSForMaskedLM, gain: float = 6.0, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = cls(BiGSConfig(**(SIZES | changes))).eval()
    with torch.no_grad():  # at the initial scale every prompt gets the same answer
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(gain)
    return model


def ids(rows: int = 2, size: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (rows, size), generator=torch.Generator().manual_seed(seed))


def published(model: Any) -> dict[str, Tensor]:
    """The state of a model under the names of the published PyTorch port, everything that it holds besides included."""
    block = {
        "LayerNorm": "norm", "dv": "value", "du_forward": "forward_in", "duc_forward": "forward_out", "du_backward": "backward_in",
        "duc_backward": "backward_out", "dol": "expand", "do": "output",
    }  # fmt: skip
    ours, theirs = model.bigs.backbone, {}
    tables = {"word_embeddings": "embedding", "position_embeddings": "positions", "token_type_embeddings": "token_types"}
    for name, mine in tables.items():
        theirs[f"bigs.embeddings.{name}.weight"] = getattr(ours, mine).weight
    for end in ("weight", "bias"):
        theirs[f"bigs.embeddings.LayerNorm.{end}"] = getattr(ours.embedding_norm, end)
        theirs[f"cls.predictions.transform.dense.{end}"] = getattr(model.cls.dense, end)
        theirs[f"cls.predictions.transform.LayerNorm.{end}"] = getattr(model.cls.norm, end)
        theirs[f"bigs.pooler.dense.{end}"] = torch.zeros(16, 16)[0 if end == "bias" else slice(None)]
    theirs["cls.predictions.decoder.weight"] = ours.embedding.weight
    theirs["cls.predictions.decoder.bias"] = theirs["cls.predictions.bias"] = model.cls.decoder.bias
    theirs["bigs.embeddings.position_ids"] = torch.arange(64)[None]
    for number, layer in enumerate(ours.blocks):
        for name, mine in block.items():
            for end in ("weight", "bias"):
                theirs[f"bigs.encoder.layer.{number}.{name}.{end}"] = getattr(getattr(layer, mine), end)
        for name, system in (("fs4", layer.forward_system), ("bs4", layer.backward_system)):
            theirs[f"bigs.encoder.layer.{number}.{name}.D"] = system.D
            for part in ("C", "log_step", "A_re", "A_im"):
                theirs[f"bigs.encoder.layer.{number}.{name}.kernel.{part}"] = getattr(system, part)
    return {name: tensor.detach().clone() for name, tensor in theirs.items()}


# ---- checkpoints (B4, B17)


def test_published_names_load_from_a_pickled_folder(tmp_path: Path) -> None:
    model = build()
    model.config.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    for ours in ("direction", "causal_form", "gate_activation", "convolution", "final_norm", "mask_padding"):
        del kept[ours]  # published files have none of these, and these that have no effect
    kept |= {"pooler_type": "non_padding_mean", "pre_norm": True, "decode": False, "classifier_dropout": None, "scaling": "hippo"}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    torch.save(published(model), tmp_path / "pytorch_model.bin")
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: set(found) for kind, found in info.items()} == {key: set() for key in info}
    assert torch.equal(loaded.eval()(ids()).logits, model(ids()).logits)
    assert loaded.config.model_type == "BiGS"


def test_published_names_are_those_here_once_renamed() -> None:
    unused = {"bigs.pooler.dense.weight", "bigs.pooler.dense.bias", "bigs.embeddings.position_ids", "cls.predictions.decoder.bias"}
    state = {ours_from_published(name): tensor for name, tensor in published(build()).items() if name not in unused}
    build().load_state_dict(state, strict=True)


def test_saving_and_loading_keeps_bits_and_the_tie(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = build()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) <= set(published(model))  # as published, so that others can read it
    loaded = BiGSForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert loaded.cls.decoder.weight is loaded.bigs.backbone.embedding.weight
    assert loaded.get_output_embeddings() is loaded.cls.decoder
    coarse = BiGSForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in coarse.named_parameters():
        assert parameter.dtype == (torch.float32 if "_system." in name else torch.bfloat16), name
    kernels = [m.bigs.backbone.blocks[1].backward_system.system().kernel(64) for m in (coarse, model)]
    assert torch.equal(*kernels)


@pytest.mark.parametrize("cls", [BiGSModel, BiGSForCausalLM])
def test_other_classes_load_what_they_save(cls: Any, tmp_path: Path) -> None:
    model = build(cls, direction="causal", final_norm=True, causal_form="gate")
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if cls is BiGSForCausalLM else AutoModel
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert isinstance(loaded, cls)
    assert torch.equal(loaded.eval()(ids())[0], model(ids())[0])


def test_the_network_loads_without_its_head_and_the_head_is_new_without_one(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "whole")
    bare = BiGSModel.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(bare(ids()).last_hidden_state, model.bigs(ids()).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    again, info = BiGSForMaskedLM.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert torch.equal(again.eval().bigs(ids()).last_hidden_state, model.bigs(ids()).last_hidden_state)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"cls"}


def test_embeddings_can_be_resized() -> None:
    model = build()
    before = model(ids()).logits
    model.resize_token_embeddings(70)
    after = model(ids()).logits
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., :61], before)


@pytest.mark.parametrize("first", ["heads_lightning", "transformers"])
def test_auto_classes_know_bigs_whichever_is_imported_first(first: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    second = "from transformers import AutoModelForMaskedLM" if first == "heads_lightning" else "import heads_lightning"
    opening = "import heads_lightning" if first == "heads_lightning" else "from transformers import AutoModelForMaskedLM"
    code = (
        f"{opening}\nimport sys\n"
        + ("assert not {'transformers', 'torch'} & set(sys.modules)\n" if first == "heads_lightning" else "")
        + f"{second}\nprint(type(AutoModelForMaskedLM.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    answer = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == "BiGSForMaskedLM", answer.stderr
    assert AutoConfig.for_model("BiGS").hidden_size == 768


# ---- the same network


def test_it_is_the_backbone_of_the_toolkit() -> None:
    model = build(final_norm=True)
    assert isinstance(model.bigs.backbone, BiGS)
    hidden = model.bigs(ids(), output_hidden_states=True)
    torch.testing.assert_close(hidden.last_hidden_state, model.bigs.backbone(batch_of(ids(), Attention.bidirectional)))
    assert len(hidden.hidden_states) == 3
    again = BiGSConfig.from_backbone(model.config.backbone_config(), vocab_size=61)
    assert again.backbone_config() == model.config.backbone_config()


def test_loss_is_the_mean_over_targets() -> None:
    model, labels = build(), ids(seed=1)
    labels[:, ::3] = -100
    output = model(ids(), labels=labels)
    want = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, want)
    torch.testing.assert_close(model(ids(), labels=labels, num_items_in_batch=10).loss * 10, want * (labels != -100).sum())
    assert model(ids(), labels=torch.full_like(labels, -100)).loss.item() == 0
    as_tuple = model(ids(), labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], want)
    causal = build(BiGSForCausalLM, direction="causal")
    output = causal(ids(), labels=ids())
    want = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    torch.testing.assert_close(output.loss, want)


def test_a_head_on_the_wrong_direction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BiGSForCausalLM needs BiGSConfig\(direction='causal'\)"):
        build(BiGSForCausalLM)
    with pytest.raises(ValueError, match=r"BiGSForMaskedLM needs BiGSConfig\(direction='bidirectional'\)"):
        build(direction="causal")
    with pytest.raises(ValueError, match="sideways"):
        BiGSConfig(direction="sideways")


# ---- padding (B11)


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_mask_hides_padding_unless_parity_is_asked_for(side: str) -> None:
    real, pads = ids(size=20), ids(size=12, seed=3)
    tokens = torch.cat((pads, real) if side == "left" else (real, pads), 1)
    content = slice(12, 32) if side == "left" else slice(0, 20)
    mask = torch.zeros_like(tokens)
    mask[:, content] = 1
    model, parity = build(gain=10.0), build(gain=10.0, mask_padding=False)
    alone = model(real).logits
    assert (model(tokens, attention_mask=mask).logits[:, content] - alone).abs().max() < 1e-4 * alone.abs().max()
    assert (parity(tokens, attention_mask=mask).logits[:, content] - alone).abs().max() > 1e-2
    assert torch.equal(parity(tokens, attention_mask=mask).logits, parity(tokens).logits)


def test_token_types_and_positions_are_read() -> None:
    model = build()
    plain = model(ids()).logits
    assert torch.equal(model(ids(), token_type_ids=torch.zeros_like(ids())).logits, plain)
    assert not torch.allclose(model(ids(), token_type_ids=torch.ones_like(ids())).logits, plain)
    assert torch.equal(model(ids(), position_ids=torch.arange(12)[None]).logits, plain)
    assert not torch.allclose(model(ids(), position_ids=torch.arange(12).flip(0)[None]).logits, plain)


# ---- generate()


@pytest.mark.parametrize("form", ["dual", "gate", "single"])
def test_generating_with_states_equals_generating_without(form: str) -> None:
    model = build(BiGSForCausalLM, direction="causal", causal_form=form)
    how: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    fast, slow = model.generate(ids(), **how), model.generate(ids(), use_cache=False, **how)
    assert torch.equal(fast, slow)
    assert len({tuple(row) for row in fast[:, 12:].tolist()}) == 2
    beams = model.generate(ids(), num_beams=3, **how)
    assert torch.equal(beams, model.generate(ids(), num_beams=3, use_cache=False, **how))


def test_prompts_padded_on_the_left_get_the_answers_that_they_get_alone() -> None:
    model, prompts = build(BiGSForCausalLM, direction="causal"), ids()
    mask = torch.ones_like(prompts)
    mask[0, :5] = 0
    how: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    together = model.generate(prompts, attention_mask=mask, **how)
    assert torch.equal(together[:1, 5:], model.generate(prompts[:1, 5:], **how))
