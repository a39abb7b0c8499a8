"""Faster versions of nn.Linear and LoRALinear. `fuse` changes the class of a model's layers in place."""

import lora.fast.variants  # noqa: F401  adds the classes of the variants
from lora.fast.layers import FastLinear, FastLoRALinear, fuse

__all__ = ["FastLinear", "FastLoRALinear", "fuse"]
