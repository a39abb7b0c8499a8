"""LoRA by hand in plain PyTorch: ΔW = (α/r)·B·A added to frozen linear layers (arXiv 2106.09685).

Read `linear.py` first, then `inject.py`.
"""

import lora.conv1d
import lora.targets
import lora.validation
import lora.variants  # noqa: F401
from lora.adapters import Adapters
from lora.check import check
from lora.check_layer import check_layer
from lora.combine import combine
from lora.config import LoraConfig
from lora.eject import eject
from lora.files import Adapter, AdapterError, load_adapter, read_adapter, save_adapter
from lora.inject import Injection, inject
from lora.linear import LoRALinear
from lora.merge import disabled, merge, merged, unmerge
from lora.mergeable import MergeableLinear
from lora.parameters import ParameterCount, count_parameters

__all__ = [
    "Adapter",
    "AdapterError",
    "Adapters",
    "Injection",
    "LoRALinear",
    "LoraConfig",
    "MergeableLinear",
    "ParameterCount",
    "check",
    "check_layer",
    "combine",
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
