"""What `inject` knows of torch's and transformers' modules: which layers cannot be adapted, and why.

Some modules read the weight of a child instead of calling it. An adapter there would be ignored without an
error, so these layers are refused, or their parent is made to call them.
"""

from __future__ import annotations

import dis
import functools
import inspect
import warnings
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora.adapted import quantised_as
from lora.config import LoraConfig, matches_end
from lora.inject import AFTER_SWAP, CHECKS, CONVERSIONS, INJECT_CHECKS, SPECIAL_TARGETS, Injection
from lora.merge import why_not_writable
from lora.mergeable import MergeableLinear
from lora.modules import WRAPPERS, named_modules, unwrap

# Attributes of a weight that say nothing of its values.
_HARMLESS = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_cuda"}
# Methods that set up a module, not called in forward.
_SETUP = {"__init__", "_init_weights", "init_weights", "reset_parameters", "_reset_parameters", "tie_weights"}


def check_targets(model: nn.Module, injection: Injection) -> None:
    """Raises TypeError if a module to adapt is not a Linear that its parent calls."""
    modules = dict(named_modules(model))
    for pattern, names in injection.adapted.items():
        for name in names:
            module, where = modules[name], f"target_modules: {pattern!r} matches {name}"
            kind = type(module)
            if not _can_be_adapted(module):
                raise TypeError(f"{where}, which is a {kind.__name__}, not a Linear")
            weight = module._parameters.get("weight")
            if weight is None:
                raise TypeError(f"{where}, whose weight is not a Parameter (pruned?)")
            if weight.ndim != 2 or not (type(weight.data) is torch.Tensor or quantised_as(weight)):
                raise TypeError(f"{where}, whose weight is sharded; inject before FSDP wraps the model")
            tensors = (*module.named_parameters(), *module.named_buffers())
            if extra := {key for key, _ in tensors} - {"weight", "bias"}:
                raise TypeError(f"{where}, which holds {min(extra)} too; it would be lost")
            if "forward" in vars(module):
                raise TypeError(f"{where}, whose forward is patched; the patch would be lost")
            parent, _, child = name.rpartition(".")
            kind = type(modules[parent])
            ignored = child in weights_read_by(kind)  # type: ignore[arg-type]  # mypy takes classes as unhashable
            if ignored and not issubclass(kind, nn.TransformerEncoderLayer):
                raise TypeError(
                    f"{where}, but {kind.__name__} reads {child}.weight without calling {child}, so that an"
                    " adapter would be ignored; choose other target_modules"
                )


def _can_be_adapted(module: nn.Module) -> bool:
    # Other subclasses of nn.Linear may never be called, or compute something else than W·x + b.
    kind = type(module)
    return kind is nn.Linear or hasattr(kind, "on_inject") or kind.__name__ in CONVERSIONS


def check_saved(model: nn.Module, injection: Injection) -> None:
    """Raises TypeError if a module in modules_to_save cannot train, ValueError if PEFT would match others."""
    modules = dict(named_modules(model))
    saved = {name for names in injection.saved.values() for name in names}
    outside = _outside_saved(modules, injection)
    for pattern in injection.saved:
        for name in outside:
            if name.endswith(pattern):
                raise ValueError(
                    f"modules_to_save: PEFT compares the ends of names, where {pattern!r} matches {name} too;"
                    " add it, or choose another name"
                )
    of = {id(parameter): name for name in saved for parameter in modules[name].parameters()}
    for name, module in outside.items():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in of:
                raise ValueError(
                    f"modules_to_save: {of[id(parameter)]} shares a parameter with {name}.{key}, which would"
                    " train too; name both, or untie them"
                )
    for name in sorted(saved):
        for key, parameter in modules[name].named_parameters():
            owner = modules[name].get_submodule(key.rpartition(".")[0])
            stored = quantised_as(parameter) or getattr(owner, "stored_as", "")
            quantised = f"stored as {stored}; name it in keep of quantise" if stored else ""
            found = quantised or why_not_writable(parameter)
            if found or not (parameter.is_floating_point() or parameter.is_complex()):
                raise TypeError(
                    f"modules_to_save: {name}.{key} is {found or parameter.dtype}, which cannot train"
                )
        for key in modules[name].state_dict():
            if key.endswith("_extra_state"):
                raise TypeError(f"modules_to_save: {name}.{key} is not a tensor, so it cannot be saved")


def _outside_saved(modules: dict[str, nn.Module], injection: Injection) -> dict[str, nn.Module]:
    """Those of `modules`, by name, that are neither in modules_to_save nor inside one that is."""
    saved = tuple(f"{name}." for names in injection.saved.values() for name in names)
    return {name: module for name, module in modules.items() if not f"{name}.".startswith(saved)}


def refuse_unmatched(model: nn.Module, injection: Injection, config: LoraConfig) -> None:
    """Raises ValueError if a pattern of the config matches nothing."""
    linears = {name.rpartition(".")[2] for name, m in named_modules(model) if isinstance(m, nn.Linear)}
    children = [name for name, _ in unwrap(model).named_children()]
    for pattern, names in injection.adapted.items():
        if not names:
            why = f" is a regular expression for whole names, unlike ({pattern!r},), and"
            why = why if pattern == config.target_modules else ""
            _raise_unmatched("target_modules", f"{pattern!r}{why}", sorted(linears))
    for pattern, names in injection.saved.items():
        if not names:
            _raise_unmatched("modules_to_save", repr(pattern), children)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(matches_end(pattern, name) for name in injection.names):
                raise ValueError(f"{field}: {pattern!r} matches no module of target_modules")


def _raise_unmatched(field: str, what: str, ends: Sequence[str]) -> None:
    raise ValueError(f"{field}: {what} matches no module; names end with {', '.join(ends)}")


def warn_of_statistics(model: nn.Module, injection: Injection, _config: LoraConfig) -> None:
    """Warns of frozen batch normalisation, whose statistics training changes and nothing saves."""
    outside = _outside_saved(dict(named_modules(model)), injection)
    frozen = [name for name, m in outside.items() if getattr(m, "running_mean", None) is not None]
    if frozen:
        warnings.warn(
            f"{', '.join(frozen)}: the running statistics change in train mode and are not saved with the"
            " adapter; keep the modules in eval mode, or name them in modules_to_save",
            stacklevel=3,
        )


@functools.cache
def weights_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """The children X whose values the methods of a module class read as `self.X.weight`.

    It is found in the bytecode: `F.linear(x, self.X.weight)` and the like, but not `self.X.weight.dtype` or
    `isinstance(self.X.weight, ...)`.
    """
    found: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if inspect.isfunction(method) and name not in _SETUP:
                found |= _weights_read_in(inspect.unwrap(method).__code__)
    return frozenset(found)


def _weights_read_in(code: CodeType) -> set[str]:
    found: set[str] = set()
    for inner in code.co_consts:  # lambdas and comprehensions
        if isinstance(inner, CodeType):
            found |= _weights_read_in(inner)
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("NOP", "CACHE")]
    for at, (owner, child, weight) in enumerate(zip(steps, steps[1:], steps[2:], strict=False)):
        # Python 3.13 loads two variables in one instruction.
        name = owner.argval[-1] if isinstance(owner.argval, tuple) and owner.argval else owner.argval
        if (name, weight.argval) != ("self", "weight"):
            continue
        after = [*steps[at + 3 : at + 5], weight]
        is_none = after[1].opname == "IS_OP" or after[0].opname.startswith("POP_JUMP")
        is_type = at > 0 and steps[at - 1].argval == "isinstance"
        if after[0].argval not in _HARMLESS and not is_none and not is_type:
            found.add(child.argval)
    return found


def all_linear(model: nn.Module) -> list[str]:
    """Every layer that computes W·x + b and can be adapted, except the output layer of a language model.

    As in PEFT, target_modules = "all-linear".
    """
    get_output = getattr(unwrap(model), "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    modules = dict(named_modules(model))
    found = [
        name for name, module in modules.items() if _can_be_adapted(module) and module is not output and name
    ]
    other = [name for name, m in modules.items() if isinstance(m, nn.Linear) and m is not output]
    if other and not found:
        kind = type(modules[other[0]]).__name__
        raise TypeError(
            f"target_modules: 'all-linear' finds no Linear: {other[0] or 'the model'} is a {kind}"
        )
    return found


def call_layers(model: nn.Module) -> None:
    """Makes every nn.TransformerEncoderLayer call its adapted layers in eval mode too.

    Its fused kernel reads the weights of linear1 and linear2. It is not used where a module has a hook.
    """
    for _, module in named_modules(model):
        adapted = any(isinstance(child, MergeableLinear) for child in module._modules.values())
        if isinstance(module, nn.TransformerEncoderLayer) and adapted:
            module.register_forward_pre_hook(use_separate_layers)


def use_separate_layers(_module: nn.Module, _inputs: Any) -> None:
    """Hook that does nothing. Its presence turns the fused kernel off."""


def guard_distributed(model: nn.Module) -> None:
    """Makes a DistributedDataParallel that was built before the adapter refuse to train it."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.register_forward_pre_hook(refuse_training)


def refuse_training(module: nn.Module, _inputs: Any) -> None:
    """Hook of a DistributedDataParallel that knows nothing of the adapter's parameters."""
    if module.training and torch.is_grad_enabled():
        raise RuntimeError(
            "the adapter was added inside DistributedDataParallel, which does not reduce its gradients; wrap"
            " the model again"
        )


def guard_loading(model: nn.Module) -> None:
    """Makes load_state_dict raise before it writes, in every module around an adapted layer."""
    modules = dict(named_modules(model))
    adapted = [name.split(".") for name, module in modules.items() if isinstance(module, MergeableLinear)]
    around = {".".join(parts[:depth]) for parts in adapted for depth in range(len(parts) + 1)}
    for module in {modules[name] for name in around}:
        module.register_load_state_dict_pre_hook(refuse_merged)  # type: ignore[no-untyped-call]


def refuse_merged(module: nn.Module, _state_dict: Any, prefix: str, *_: Any) -> None:
    """Hook of every module around an adapted layer, so that load_state_dict raises before it writes."""
    for name, child in named_modules(module, prefix.rstrip(".")):
        if isinstance(child, MergeableLinear) and child.merged:
            raise RuntimeError(f"{name or 'the layer'}: load_state_dict into a merged layer; unmerge first")


HOOKS = (use_separate_layers, refuse_training, refuse_merged)


def remove_hooks(module: nn.Module) -> None:
    """Removes the hooks that this file has registered on a module."""
    for hooks in (module._load_state_dict_pre_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in HOOKS]:
            del hooks[key]


WRAPPERS |= {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
SPECIAL_TARGETS["all-linear"] = all_linear
CHECKS += [check_targets, check_saved]
INJECT_CHECKS += [refuse_unmatched, warn_of_statistics]
AFTER_SWAP += [call_layers, guard_distributed, guard_loading]
