"""Step 9: the head. Why it must train, and be saved with the adapter."""

import torch
from torch import Tensor, nn


def adapter_state(model: nn.Module, head: str) -> dict[str, Tensor]:
    """Copies of the tensors that have to be saved: every lora_A and lora_B, and the whole head.

    The keys are the model's own names, as in model.state_dict().
    """
    # [step 9: choose by name from model.state_dict(), and copy]
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name.endswith((".lora_A", ".lora_B")) or name.startswith(f"{head}.")
    }
    # [end]


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor], head: str) -> None:
    """Writes `state` into a model that has fresh adapters and a fresh head.

    Raises ValueError if `state` lacks a tensor that the model needs, has one too many, or has one of another
    shape. The model is then unchanged.
    """
    # [step 9: compare names and shapes with what the model needs; only then write]
    needed = adapter_state(model, head)
    if state.keys() != needed.keys():
        raise ValueError(f"missing or superfluous: {sorted(state.keys() ^ needed.keys())}")
    for name, tensor in state.items():
        if tensor.shape != needed[name].shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)}, not {tuple(needed[name].shape)}")
    own = model.state_dict()  # its tensors share memory with the model's
    for name, tensor in state.items():
        own[name].copy_(tensor)
    # [end]
