"""The base model: where its weights and tokenizer come from, and `speed_up`.

Importing transformers takes seconds, and some commands need no model. Therefore the names below are imported
when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

HEAD = ("classifier",)  # the newly initialised module of RobertaForSequenceClassification

__all__ = ["HEAD", "ModelError", "load_base", "longest_text", "speed_up"]

if TYPE_CHECKING:
    from model.base import ModelError, load_base, longest_text
    from model.fast import speed_up
else:

    def __getattr__(name: str) -> Any:
        """The public name `name`, imported from its module (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = "model.fast" if name == "speed_up" else "model.base"
        return getattr(importlib.import_module(module), name)
