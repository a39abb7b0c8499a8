"""LoRA by hand in plain PyTorch: ΔW = (α/r)·B·A beside frozen linear layers (arXiv 2106.09685).

Start with `linear.py`, then `inject.py`.
"""

from lora.config import LoraConfig
from lora.files import Adapter, AdapterError, load_adapter, read_adapter, save_adapter
from lora.inject import Injection, eject, inject
from lora.linear import LoRALinear
from lora.merge import disabled, merge, merged, unmerge
from lora.parameters import Ledger, count_parameters

__all__ = [
    "Adapter",
    "AdapterError",
    "Injection",
    "Ledger",
    "LoRALinear",
    "LoraConfig",
    "count_parameters",
    "disabled",
    "eject",
    "inject",
    "load_adapter",
    "merge",
    "merged",
    "read_adapter",
    "save_adapter",
    "unmerge",
]
