"""The base model: where its weights and tokenizer come from, and `speed_up`."""

from model.base import HEAD, ModelError, load_base
from model.fast import speed_up

__all__ = ["HEAD", "ModelError", "load_base", "speed_up"]
