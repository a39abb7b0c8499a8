"""Which RoBERTa to adapt: where its weights and its tokenizer come from, and how it trains fast."""

from model.base import HEAD, ModelError, load_base
from model.fast import speed_up

__all__ = ["HEAD", "ModelError", "load_base", "speed_up"]
