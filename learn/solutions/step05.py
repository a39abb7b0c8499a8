"""Step 5: freeze and count, the head included."""

from torch import nn


def train_only(model: nn.Module, head: str) -> None:
    """Lets the adapters and the head train, and freezes every other parameter.

    An adapter's parameters have dotted names that end in ".lora_A" or ".lora_B". head: the name of the child
    of the model that is trained in full, such as "classifier"; its parameters' names begin with it and a dot.
    """
    # [step 5: set requires_grad of every parameter]
    for name, parameter in model.named_parameters():
        is_adapter = name.endswith((".lora_A", ".lora_B"))
        parameter.requires_grad_(is_adapter or name.startswith(f"{head}."))
    # [end]


def count(model: nn.Module, head: str) -> dict[str, int]:
    """The number of elements by role: {"lora": …, "head": …, "frozen": …}.

    lora and head count parameters that train. Whatever does not train is frozen. Each Parameter counts once.
    """
    # [step 5: loop over the parameters and add up their numel()]
    counts = {"lora": 0, "head": 0, "frozen": 0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            counts["frozen"] += parameter.numel()
        elif name.startswith(f"{head}."):
            counts["head"] += parameter.numel()
        else:
            counts["lora"] += parameter.numel()
    return counts
    # [end]
