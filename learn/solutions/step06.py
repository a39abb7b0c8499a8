"""Step 6: the injector. Walk the module tree, match names, swap layers."""

from collections.abc import Callable, Sequence

from torch import nn


def ends_with(name: str, pattern: str) -> bool:
    """Whether `pattern` is the dotted `name`, or its last components, whole."""
    # [step 6: compare whole components]
    return name == pattern or name.endswith(f".{pattern}")
    # [end]


def inject(
    model: nn.Module, patterns: Sequence[str], make_layer: Callable[[nn.Linear], nn.Module], head: str
) -> list[str]:
    """Replaces each nn.Linear whose name ends with one of `patterns` by make_layer(linear), in place.

    Layers inside the child called `head` stay, because the head is trained in full. Returns the dotted names
    of the replaced layers, in the model's order.

    Raises ValueError, which names the pattern, if one matches no such layer. The model is then unchanged.
    """
    # [step 6: find all layers first, check the patterns, then replace]
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not f"{name}.".startswith(f"{head}.")
        and any(ends_with(name, pattern) for pattern in patterns)
    }
    for pattern in patterns:
        if not any(ends_with(name, pattern) for name in found):
            raise ValueError(f"{pattern!r} matches no nn.Linear")
    for name, linear in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make_layer(linear))
    return list(found)
    # [end]
