"""The layers of the textbook, faster: `fuse` changes the class of a model's layers in place."""

from lora.fast.layers import FastLinear, FastLoRALinear, copy_bytes, fuse

__all__ = ["FastLinear", "FastLoRALinear", "copy_bytes", "fuse"]
