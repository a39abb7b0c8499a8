"""Many adapters on one frozen base: load, switch, mix in one batch (arXiv 2106.09685, section 4.2).

    adapters = Adapters(model)                          # a base model
    adapters.load("topics", "runs/a/adapter")
    adapters.add("tone", LoraConfig(r=4))
    adapters.use("topics")                              # None: the base alone
    with adapters.rows(["topics", "tone", None]):       # one name per row of the batch
        logits = model(**batch).logits

One adapter is active, or none, and the model is then what `inject` makes of it: training, merging, saving and
everything else that handles one adapter works on the active one. The others are modules outside the model
that share the base's weights. Switching puts other modules in their places and writes to no tensor.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora.adapted import has_adapter, lora_config, lora_layers
from lora.config import LoraConfig
from lora.files import Adapter, load_adapter, read_adapter, save_adapter, saved_modules
from lora.inject import inject
from lora.interrupts import uninterrupted
from lora.merge import restoring
from lora.mergeable import MergeableLinear
from lora.mixed import MixedModule
from lora.modules import unwrap

Hook = tuple[dict[int, Any], int, Any]  # a module's table of hooks, the key, and the hook


class Slot(NamedTuple):
    """A place in a model's tree of modules."""

    parent: nn.Module
    child: str

    def get(self) -> nn.Module:
        module = self.parent._modules[self.child]
        assert module is not None
        return module

    def put(self, module: nn.Module) -> None:
        self.parent._modules[self.child] = module


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter of `Adapters`.

    layers, saved: its adapted layers and modules_to_save, by their names in the model. modules: all that it
    puts in the place of one of the base. hooks: those of `inject` on modules around them, by table and key.
    """

    config: LoraConfig
    layers: dict[str, MergeableLinear]
    saved: dict[str, nn.Module]
    modules: dict[Slot, nn.Module]
    hooks: list[Hook]


class Adapters:
    """The adapters of one base model, by name. At most one of them is active.

    Each has its own rank, targets, variant and modules_to_save, such as heads with other numbers of classes.
    The base is frozen, and no method changes a value of it. Each method leaves everything as it was if it
    raises. Not for several threads at once.

    Every method raises RuntimeError while the active adapter is merged or disabled, or if the model has been
    changed by others (`inject`, `eject`); ValueError for a name that is unknown, or taken.
    """

    def __init__(self, model: nn.Module):
        """Raises RuntimeError if the model has an adapter already."""
        if has_adapter(model):
            raise RuntimeError("the model has an adapter already; eject it first, then load it by name")
        self.model = model
        self.active: str | None = None
        self._named: dict[str, NamedAdapter] = {}
        self._base: dict[Slot, nn.Module] = {}  # what the base has in the places of all adapters
        self._hooks: list[Hook] = []  # those that are in place now
        self._mixing = False  # inside rows()
        model.requires_grad_(False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they were added."""
        return tuple(self._named)

    def __getitem__(self, name: str) -> NamedAdapter:
        if name not in self._named:
            raise ValueError(f"no adapter is called {name!r}; there are {', '.join(self._named) or 'none'}")
        return self._named[name]

    def __repr__(self) -> str:
        lines = [
            f"{'*' if name == self.active else ' '} {name}: r={each.config.r}, {len(each.layers)} layers"
            for name, each in self._named.items()
        ]
        return "\n".join(lines) or "no adapters"

    def add(
        self,
        name: str,
        config: LoraConfig,
        seed: int = 0,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Adds a fresh adapter, as `inject` does. The active one stays active.

        Modules in config.modules_to_save start as copies of the base's. modules: others to take instead, by
        their names in the model, such as a head with more classes.

        Raises as `inject` does.
        """
        self._add(name, config, lambda: modules or {}, lambda: inject(self.model, config, seed))

    def load(
        self,
        name: str,
        folder: str | os.PathLike[str] | Adapter,
        check_base: bool = True,
        layer: type[MergeableLinear] | None = None,
    ) -> Adapter:
        """Adds the adapter in a folder, as `load_adapter` does. The active one stays active.

        A Linear in modules_to_save gets as many outputs as the folder's has, for heads of other sizes.

        Raises as `load_adapter` does.
        """
        adapter = folder if isinstance(folder, Adapter) else read_adapter(folder)

        def heads() -> Mapping[str, nn.Module]:
            return {
                head: _resized(module, head, adapter.tensors)
                for head, module in saved_modules(self.model, adapter.config).items()
            }

        self._add(name, adapter.config, heads, lambda: load_adapter(self.model, adapter, check_base, layer))
        return adapter

    def use(self, name: str | None) -> None:
        """Makes this adapter the active one; None leaves the base alone."""
        if name is not None:
            self[name]  # raises if it is unknown
        self._check_unchanged()
        with uninterrupted():
            self._activate(name)

    def remove(self, name: str) -> None:
        """Removes an adapter. If it was active, the base is left alone."""
        removed = self[name]
        self._check_unchanged()
        with uninterrupted():
            if name == self.active:
                self._activate(None)
            del self._named[name]
            used = {slot for each in self._named.values() for slot in each.modules}
            for slot in removed.modules.keys() - used:
                del self._base[slot]

    def save(
        self,
        name: str,
        folder: str | os.PathLike[str],
        base: str,
        task_type: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves an adapter's folder, as `save_adapter` does, whichever is active."""
        self[name]  # raises if it is unknown
        self._check_unchanged()
        with self._restored(), uninterrupted():
            self._activate(name)
            save_adapter(self.model, folder, base, task_type, metadata)

    @contextmanager
    def rows(self, names: Sequence[str | None], exact: bool = True) -> Iterator[nn.Module]:
        """Context in which row i of a batch is computed with the adapter names[i]; None is the base alone.

        For inference. Outputs have the batch as their first dimension, and so have the inputs of all adapted
        modules. If heads have different numbers of outputs, a row's further ones are -inf, which is
        probability 0.

        exact: each row equals, bit for bit, the same batch computed with its adapter alone. exact=False
        equals it to rounding, and is faster where adapters have other ranks or are not `speed_up`
        (lora/mixed.py).

        Raises RuntimeError in training mode.
        """
        for name in names:
            if name is not None:
                self[name]  # raises if it is unknown
        if not names:
            raise ValueError("rows: no names; give one for each row of the batch")
        self._check_unchanged()
        if self.model.training:
            raise RuntimeError("a mixed batch in training mode; call eval() first")
        device = next(self.model.parameters()).device
        numbers = {
            name: torch.tensor([i for i, each in enumerate(names) if each == name], device=device)
            for name in dict.fromkeys(names)
        }
        with self._restored():
            with uninterrupted():
                self._mixing = True
                mixed = {slot: self._mixed(slot, numbers, exact) for slot in self._base}
                self._activate(None)
                self._place(mixed, [hook for name in numbers if name for hook in self[name].hooks])
            yield self.model

    def _mixed(self, slot: Slot, rows: Mapping[str | None, Tensor], exact: bool) -> nn.Module:
        """What stands in a place while the rows of a batch belong to these adapters."""
        base = self._base[slot]
        by_module: dict[nn.Module, list[Tensor]] = {}
        for name, numbers in rows.items():
            module = base if name is None else self._named[name].modules.get(slot, base)
            by_module.setdefault(module, []).append(numbers)
        for module in by_module:
            _prepare(module, slot.get())
        if len(by_module) == 1:
            return module
        joined = {module: torch.cat(numbers) for module, numbers in by_module.items()}
        return MixedModule(base, joined, sum(map(len, rows.values())), exact)

    def _add(
        self,
        name: str,
        config: LoraConfig,
        modules: Callable[[], Mapping[str, nn.Module]],
        put_in: Callable[[], object],
    ) -> None:
        """modules: makes those to take instead of copies of the base's. put_in: injects the adapter then."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: {name!r} is not a non-empty string")
        if name in self._named:
            raise ValueError(f"an adapter is called {name!r} already; remove it first")
        self._check_unchanged()
        with self._restored(), uninterrupted():
            self._activate(None)
            before, tables = _slots(self.model), _hook_tables(self.model)
            keys = [set(table) for table in tables]
            hooks: list[Hook] = []
            try:
                self._place_copies(config, modules())
                put_in()
                changed = {slot: slot.get() for slot, old in before.items() if slot.get() is not old}
                saved = saved_modules(self.model, config)
                layers = lora_layers(self.model)
                added = NamedAdapter(lora_config(self.model), layers, saved, changed, hooks)
            finally:
                for slot, module in before.items():
                    slot.put(module)
                for table, old in zip(tables, keys, strict=True):
                    hooks += [(table, key, table.pop(key)) for key in table.keys() - old]
            self._base |= {slot: before[slot] for slot in changed}
            self._named[name] = added

    def _place_copies(self, config: LoraConfig, modules: Mapping[str, nn.Module]) -> None:
        """Replaces the modules in modules_to_save by those in `modules`, or by copies."""
        saved = saved_modules(self.model, config)
        if unknown := modules.keys() - saved.keys():
            raise ValueError(
                f"modules: {min(unknown)} is not in modules_to_save, which has {', '.join(saved)}"
            )
        copies = {
            module: modules[name] if name in modules else copy.deepcopy(module)
            for name, module in saved.items()
        }
        for slot, module in _slots(self.model).items():
            if module in copies:
                slot.put(copies[module].train(module.training))

    def _activate(self, name: str | None) -> None:
        active = None if name is None else self._named[name]
        self._place(active.modules if active else {}, active.hooks if active else [])
        self.active = name
        vars(unwrap(self.model)).pop("lora_config", None)
        if active:
            unwrap(self.model).lora_config = active.config  # type: ignore[assignment]

    def _place(self, modules: Mapping[Slot, nn.Module], hooks: list[Hook]) -> None:
        """Puts these modules in their places and the base's in all others, and these hooks alone."""
        for slot, base in self._base.items():
            old, new = slot.get(), modules.get(slot, base)
            if new is not old:
                _prepare(new, old)
                slot.put(new)
        for table, key, _ in self._hooks:
            table.pop(key, None)
        for table, key, hook in hooks:
            table[key] = hook
        self._hooks = hooks

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Context that puts the active adapter back on leaving, also by an exception."""
        active = self.active

        def restore() -> None:
            self._mixing = False
            self._activate(active)

        with restoring(restore):
            yield

    def _check_unchanged(self) -> None:
        """Raises RuntimeError if the model is not as this object left it."""
        if self._mixing:
            raise RuntimeError("inside rows(); leave the context first")
        active = None if self.active is None else self._named[self.active]
        for slot, base in self._base.items():
            if slot.get() is not (active.modules.get(slot, base) if active else base):
                raise RuntimeError(
                    "the adapters of the model were changed by others, such as eject or inject"
                )
        for layer in active.layers.values() if active else ():
            if layer.merged or not layer.enabled:
                state = "merged; unmerge" if layer.merged else "disabled; leave the context"
                raise RuntimeError(f"the adapter {self.active!r} is {state} first")
        if not active and has_adapter(self.model):
            raise RuntimeError("the model has an adapter without a name; eject it first")


def _slots(model: nn.Module) -> dict[Slot, nn.Module]:
    """Every place of the model's tree and the module in it."""
    return {
        Slot(parent, child): module
        for parent in model.modules()
        for child, module in parent._modules.items()
        if module is not None
    }


def _hook_tables(model: nn.Module) -> list[dict[int, Any]]:
    return [t for m in model.modules() for t in (m._forward_pre_hooks, m._load_state_dict_pre_hooks)]


def _prepare(new: nn.Module, old: nn.Module) -> None:
    """Gives a module the mode, the speed-ups, the device and the dtype of the one whose place it takes."""
    if new.training != old.training:
        new.train(old.training)
    if hasattr(old, "on_inject"):
        old.on_inject(new)  # type: ignore[operator]
    for parameter in old.parameters():
        if any(tensor.device != parameter.device for tensor in new.parameters()):
            new.to(parameter.device)
        break
    if not isinstance(new, MergeableLinear):  # a head, which a cast of the model has not reached
        for mine, active in zip(new.parameters(), old.parameters(), strict=False):
            mine.data = mine.data.to(active.dtype)


def _resized(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module whose Linears have as many outputs as `tensors`, by the model's names, have rows."""
    resized = copy.deepcopy(module)
    for child, linear in list(resized.named_modules()):
        weight = tensors.get(".".join(filter(None, (name, child, "weight"))))
        if not isinstance(linear, nn.Linear) or weight is None or weight.ndim != 2:
            continue
        if len(weight) != linear.out_features:
            old = linear.weight
            new = nn.Linear(linear.in_features, len(weight), linear.bias is not None, old.device, old.dtype)
            _prepare(new, linear)
            if not child:
                return new
            resized.set_submodule(child, new)
    return resized
