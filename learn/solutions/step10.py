"""Step 10: save in PEFT's format."""

import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor


def peft_key(name: str) -> str:
    """The key of a tensor in PEFT's file.

    "encoder.query.lora_A" -> "base_model.model.encoder.query.lora_A.weight"
    "classifier.dense.bias" -> "base_model.model.classifier.dense.bias"
    """
    # [step 10: the prefix for every name, the suffix for lora_A and lora_B alone]
    suffix = ".weight" if name.endswith((".lora_A", ".lora_B")) else ""
    return f"base_model.model.{name}{suffix}"
    # [end]


def save_peft(
    state: dict[str, Tensor], folder: Path, base: str, r: int, lora_alpha: float,
    target_modules: Sequence[str], head: str,
) -> None:  # fmt: skip
    """Writes adapter_config.json and adapter_model.safetensors into `folder`, which exists.

    state: what adapter_state of step 9 returns. base: the name of the base model.
    """
    # [step 10: json.dumps for the config, safetensors.torch.save_file for the tensors]
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": lora_alpha,
        "target_modules": list(target_modules),
        "modules_to_save": [head],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    tensors = {peft_key(name): tensor for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    # [end]
