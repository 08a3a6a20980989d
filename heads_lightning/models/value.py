"""Language models of transformers with a value head: the classes that TRL had until 1.12, kept.

The wrapped model runs its own forward, unchanged, so logits are its own to the bit. A hook on its decoder keeps the last hidden state while
it passes, and the value head reads that: no list of all hidden states, nothing that breaks a compiled graph. Another on its head over the
vocabulary sees what that reads, from which the loss of a causal model is formed chunk by chunk: no soft-max of [B, T, V] is kept.

Choices. State dicts have the layout of the saved files: the model's own keys, then `v_head.…`; loading accepts it at any depth. Files are
safetensors. What is missing, unknown or contradictory is an error with a name; a checkpoint without a value head says so.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from heads_lightning.heads.value import ValueHead
from heads_lightning.losses import linear_cross_entropy, loss_module
from heads_lightning.losses.base import is_dtensor
from heads_lightning.models.value_files import PREFIX, VALUE_HEAD_FILE, hub_arguments, open_model, value_head_weights, with_adapter

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "ValueHead",
]

log = logging.getLogger(__name__)

WRAPPED = "pretrained_model."


class _LastState:
    """A forward hook that keeps the last hidden state where it is waited for. An object, so that a copied model has a hook of its own."""

    def __init__(self) -> None:
        self.waiting = False
        self.hidden_BSD: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.waiting:
            self.hidden_BSD = output[0]

    def wait(self) -> None:
        """Keep what passes from now on: a model that is used by itself leaves nothing in memory."""
        self.waiting = True

    def take(self) -> Tensor:
        """The state that passed."""
        hidden_BSD, self.hidden_BSD, self.waiting = self.hidden_BSD, None, False
        if hidden_BSD is None:
            raise RuntimeError("the model ran without its decoder (get_decoder()): the value head has nothing to read")
        return hidden_BSD


class _Vocabulary:
    """Hooks of a head over the vocabulary, and the loss of a causal model from what it reads instead of from what it returns.

    transformers calls a model's `loss_function` with its logits. Where these are the head's output as it is, their loss is formed chunk by
    chunk from hidden states and weight; logits that were scaled or capped, and losses that are asked for in other ways, stay the model's.
    """

    def __init__(self, model: Any, head: nn.Module) -> None:
        self.waiting = self.last_only = False
        self.hidden_BSD: Tensor | None = None
        self.logits: Tensor | None = None
        self.head: Any = head
        self.own_loss = model.loss_function
        if type(head) is nn.Linear and self.own_loss is ForCausalLMLoss:
            loss_module("auto")  # now, and not while a graph is compiled
            model.loss_function = self.loss
        head.register_forward_pre_hook(self.before)
        head.register_forward_hook(self.after)

    def before(self, module: nn.Module, args: Any) -> tuple[Tensor] | None:
        if not self.waiting:
            return None
        self.hidden_BSD = args[0]
        return (args[0][:, -1:],) if self.last_only else None

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.waiting:
            self.logits = output

    def wait(self, *, last_only: bool) -> None:
        """Look at the next call; with last_only, show the head the last position alone."""
        self.waiting, self.last_only = True, last_only

    def forget(self) -> None:
        """Hold nothing."""
        self.waiting = self.last_only = False
        self.hidden_BSD = self.logits = None

    def loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        """Mean cross-entropy of the next tokens; 0 where there is none."""
        if self.waiting and self.hidden_BSD is not None and logits is self.logits and not kwargs and self._is_whole():
            hidden_BSD = self.hidden_BSD[:, :-1]
            labels = labels[:, 1:].to(hidden_BSD.device)
            return linear_cross_entropy(hidden_BSD, self.head.weight, labels, bias=self.head.bias, implementation="auto").total
        if self.last_only:
            raise ValueError("this model forms its loss from logits in a way of its own; leave return_logits=False out")
        return self.own_loss(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)

    def _is_whole(self) -> bool:
        """The weight is here: not sharded, nor on another device."""
        weight_VD = self.head.weight
        is_here = self.hidden_BSD is not None and self.hidden_BSD.device == weight_VD.device
        return is_here and not is_dtensor(weight_VD) and weight_VD.dim() == 2


class PreTrainedModelWithValueHead(nn.Module):
    """What both wrappers share. Attributes that it lacks are the wrapped model's (config, device, get_input_embeddings, …).

    Args:
        pretrained_model: a model of transformers with a head over the vocabulary, or a PeftModel around one.
        summary_dropout_prob: dropout before the value, in training alone; 0.1 unless said here or in the model's config. None: none.
        v_head_initializer_range: standard deviation of v_head_init_strategy="normal".
        v_head_init_strategy: None (torch.nn.Linear's own) or "normal" (and bias 0).

    Raises:
        ValueError: the model has no head over a vocabulary, is partly off its devices, or is prompt-tuned; an argument does not exist.
    """

    transformers_parent_class: ClassVar[Any]
    """Opens names and folders."""
    supported_args: ClassVar[tuple[str, ...]] = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")
    """Arguments of the value head; the others of from_pretrained are the wrapped model's."""
    lm_head_namings: ClassVar[list[str]] = ["lm_head", "embed_out", "output_projection"]
    """Kept for programs that read it. A head is recognised by get_output_embeddings(), whatever its name."""

    def __init__(self, pretrained_model: Any, **kwargs: Any) -> None:
        super().__init__()
        unknown = kwargs.keys() - set(self.supported_args)
        if unknown:
            raise ValueError(
                f"{', '.join(sorted(unknown))} is no argument of {type(self).__name__}; it has {', '.join(self.supported_args)}"
            )
        _check_wrappable(pretrained_model)
        base = _unwrapped(pretrained_model)
        self.pretrained_model = pretrained_model
        self.v_head = ValueHead(base.config, **kwargs).to(base.get_output_embeddings().weight.device)
        self._last_state = _LastState()
        _decoder(base).register_forward_hook(self._last_state)
        self._vocabulary = _Vocabulary(base, base.get_output_embeddings())
        self._register_load_state_dict_pre_hook(_nest_keys)
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "pretrained_model":  # not built yet: a copy or an unpickling asks before it is there
                raise
            return getattr(self.pretrained_model, name)

    @property
    def is_peft_model(self) -> bool:
        """The wrapped model is a PeftModel."""
        return not isinstance(self.pretrained_model, PreTrainedModel)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Logits, loss and values.

        Args:
            input_ids: int64 [B, T].
            past_key_values: cache of the positions before.
            attention_mask: [B, T], 0 at padding.
            return_past_key_values: also return the cache.
            return_logits: False never forms them all: a critic reads the values alone, and the loss of a causal model needs no logits.
            kwargs: of the wrapped model (labels, decoder_input_ids, …). return_dict is accepted and has no influence.

        Returns:
            (logits fp32 [B, T, V] or None, loss or None, value fp32 [B, T]), then the cache where it was asked for. T is the decoder's
            length in encoder-decoder models.

        Raises:
            ValueError: return_logits=False with labels, where the model makes its loss of its logits in a way of its own.
        """
        kwargs["return_dict"] = True
        kwargs.setdefault("use_cache", return_past_key_values or past_key_values is not None)
        given = {"input_ids": input_ids, "past_key_values": past_key_values, "attention_mask": attention_mask}
        self._last_state.wait()
        self._vocabulary.wait(last_only=not return_logits)
        try:
            output = self.pretrained_model(**{k: v for k, v in given.items() if v is not None}, **kwargs)
        finally:
            self._vocabulary.forget()
        hidden_BSD = self._last_state.take()
        value_BS1 = self.v_head(hidden_BSD.to(self.v_head.summary.weight.device))
        found = (output.logits.float() if return_logits else None, output.loss, value_BS1.squeeze(-1))
        return (*found, output.past_key_values) if return_past_key_values else found

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's generate."""
        return self.pretrained_model.generate(*args, **kwargs)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model's own keys, then `v_head.…`: as the files have them. Whole for adapters too: base, adapters and value head."""
        whole = self.pretrained_model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.v_head.state_dict(destination=whole, prefix=prefix + PREFIX, keep_vars=keep_vars)

    def post_init(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the value head from a state dict: the keys that begin with `v_head.`, which must be all of its own."""
        self.v_head.load_state_dict({k.removeprefix(PREFIX): v for k, v in state_dict.items() if k.startswith(PREFIX)})

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that from_pretrained opens; the keywords are those of the wrapped model (max_shard_size, …).

        Of a model: its own layout with the value head among the weights. Of an adapter: the adapter, and the head beside it.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if kwargs.get("safe_serialization") is False:
            raise ValueError("safe_serialization=False writes a pickle; leave it out: value heads are saved as safetensors")
        if self.is_peft_model:
            self.pretrained_model.save_pretrained(folder, **kwargs)
            head = {PREFIX + name: tensor.contiguous() for name, tensor in self.v_head.state_dict().items()}
            save_file(head, folder / VALUE_HEAD_FILE, metadata={"format": "pt"})
        else:
            state = kwargs.pop("state_dict", None) or self.state_dict()
            self.pretrained_model.save_pretrained(folder, state_dict=state, **kwargs)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str | None = None) -> Any:
        """Upload what save_pretrained writes. The wrapped model is left as it was."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message or "Upload model with value head")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Open a name, a folder or a model object, and its value head where there is one.

        Args:
            pretrained_model_name_or_path: on the hub, a folder, a PreTrainedModel or a PeftModel.
            model_args: of the wrapped model's from_pretrained.
            kwargs: `supported_args` are the value head's; `peft_config` puts an adapter around the model; `is_trainable` opens a
                saved adapter for training; the others go to the wrapped model's from_pretrained.

        Raises:
            ValueError: neither a name nor a model; a pickle where safetensors are expected.
        """
        head = {k: kwargs.pop(k) for k in cls.supported_args if k in kwargs}
        if kwargs.pop("reward_adapter", None) is not None:
            raise ValueError("reward_adapter does not exist here; open the reward model on its own")
        source = pretrained_model_name_or_path
        if isinstance(source, str | Path):
            model = open_model(cls.transformers_parent_class, str(source), model_args, kwargs)
        else:
            model = with_adapter(source, kwargs.pop("peft_config", None))
        wrapper = cls(model, **head)
        if isinstance(source, str | Path):
            _load_value_head(wrapper, str(source), hub_arguments(kwargs))
        return wrapper


class AutoModelForCausalLMWithValueHead(PreTrainedModelWithValueHead):
    """A causal language model and a value at each position."""

    transformers_parent_class: ClassVar[Any] = AutoModelForCausalLM


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWithValueHead):
    """An encoder-decoder and a value at each position of the decoder."""

    transformers_parent_class: ClassVar[Any] = AutoModelForSeq2SeqLM


# -- what is wrapped -----------------------------------------------------------------------------------------------------


def _unwrapped(model: Any) -> Any:
    """The model of transformers inside a PeftModel, or the model itself."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _check_wrappable(model: Any) -> None:
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        raise ValueError(f"a value head goes around a PreTrainedModel, a PeftModel, or the name of one, not {type(model).__name__}")
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError("a prompt-tuned model has positions that no token stands at; use an adapter such as LoRA")
    base = _unwrapped(model)
    name = type(base).__name__
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"{name} has no head over a vocabulary (get_output_embeddings() is None); use its ForCausalLM or ForConditionalGeneration class"
        )
    places = set(map(str, (getattr(base, "hf_device_map", None) or {}).values()))
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise ValueError(f"{name} is spread over {', '.join(sorted(places))}; a value head needs every part on a device")


def _decoder(model: Any) -> nn.Module:
    """The module whose output is the last hidden state that the head over the vocabulary reads, before any scaling."""
    inner = model.get_decoder()
    while isinstance(inner, PreTrainedModel) and (deeper := inner.get_decoder()) is not inner:
        inner = deeper
    return inner


def _nest_keys(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: the wrapped model's keys get the name of the attribute that it stands under."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        inner = key[len(prefix) :]
        if not inner.startswith((PREFIX, WRAPPED)):
            state_dict[prefix + WRAPPED + inner] = state_dict.pop(key)


# -- files ---------------------------------------------------------------------------------------------------------------


def _load_value_head(wrapper: PreTrainedModelWithValueHead, source: str, hub: Mapping[str, Any]) -> None:
    """Load the head that stands in a folder, from whichever of its files; say so where there is none."""
    state = value_head_weights(source, hub)
    if state:
        wrapper.post_init(state)
    else:
        log.warning("%s holds no value head: the head starts as it was initialised", source)
