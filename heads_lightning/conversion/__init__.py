"""Checkpoints to and from Hugging Face: declared once per family, checked by numbers, streamed tensor by tensor.

`mapping` declares how weights correspond, `families` what each architecture is, `streaming` moves the tensors, `validation` runs both
models. Importing this package needs neither torch nor transformers.
"""

from heads_lightning.conversion.converter import StateConverter
from heads_lightning.conversion.mapping import ConversionError, StateMapping, StateMappingTemplate, StateType, TemplatePlaceholder

__all__ = ["ConversionError", "StateConverter", "StateMapping", "StateMappingTemplate", "StateType", "TemplatePlaceholder"]
