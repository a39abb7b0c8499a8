"""Which RoBERTa to adapt: where its weights and its tokenizer come from."""

from model.base import HEAD, ModelError, load_base

__all__ = ["HEAD", "ModelError", "load_base"]
