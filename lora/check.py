"""Finds adapters that a model does not use, by running it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora.adapted import lora_layers, quantised_as, unmerged
from lora.merge import merged
from lora.mergeable import MergeableLinear
from lora.quantised.tensor import stored_tensors


@dataclass
class Report:
    """The results of a check, one line each. `problems` has the lines that failed. False if there are any."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, ok: bool, text: str) -> None:
        self.lines.append(f"{'ok  ' if ok else 'FAIL'}  {text}")
        if not ok:
            self.problems.append(text)

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return "\n".join(self.lines)


@torch.no_grad()
def check(model: nn.Module, inputs: Any) -> Report:
    """Runs the model in train mode, in eval mode and merged, and reports adapters that have no effect.

    inputs: a mapping of keyword arguments, a tuple of positional ones, or the only argument. The model's
    mode, random state, weights and buffers are the same afterwards.

    A layer fails if it is not called, if another module reads its weight directly, or if for the same input
    its merged output differs from its output by more than rounding: by more than √ε of the largest value,
    for the ε of the weight's dtype. The model's output is compared in the same way. Outputs are not compared
    on a quantised base, into which nothing can be merged.

    Raises RuntimeError if the model has no adapter, or is merged or disabled.
    """
    layers = unmerged(lora_layers(model))
    report = Report()
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module._buffers, key, buffer, buffer.clone())  # some modules write to theirs, some replace them
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    watch = _Watch(layers)
    with torch.random.fork_rng(), watch:
        try:
            for mode in ("train", "eval"):
                model.train(mode == "train")
                watch.restart()
                output = _flat(_call(model, inputs))
                called, read = set(watch.inputs), set(watch.read)
                missing = [name for name in layers if name not in called]
                text = f"{mode} mode: {len(called)} of {len(layers)} adapted layers are called"
                report.add(not missing, text + (f", not {', '.join(missing)}" if missing else ""))
                for name in sorted(read):
                    report.add(False, f"{mode} mode: another module reads {name}.weight, without its adapter")
            kept = dict(watch.inputs)
            separate = {name: layers[name](*args, **kwargs) for name, (args, kwargs) in kept.items()}
            if any(quantised_as(layer.weight) for layer in layers.values()):
                report.add(True, "merged: not compared, because a quantised weight cannot be merged into")
                return report
            with merged(model):
                for name, (args, kwargs) in kept.items():
                    same, text = _close(
                        separate[name], layers[name](*args, **kwargs), layers[name].weight.dtype
                    )
                    if not same:
                        report.add(False, f"{name}: merged output differs by {text}")
                worst = max(
                    (layer.weight.dtype for layer in layers.values()), key=lambda d: torch.finfo(d).eps
                )
                same, text = _close(output, _flat(_call(model, inputs)), worst)
                report.add(same, f"merged: the model's output differs by {text}")
        finally:
            for module, mode_before in modes.items():
                module.training = mode_before
            for table, key, buffer, before in buffers:
                table[key] = buffer.copy_(before)
    return report


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _flat(output: Any) -> Tensor:
    """All floating-point tensors of a model's output, one after the other."""
    if isinstance(output, Tensor):
        return output.flatten() if output.is_floating_point() else output.new_zeros(0, dtype=torch.float32)
    values = output.values() if isinstance(output, Mapping) else output
    parts = [_flat(value) for value in values if isinstance(value, Tensor | Mapping | tuple | list)]
    return torch.cat(parts) if parts else torch.zeros(0)


def _close(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[bool, str]:
    largest = max(float(x.where(x.isfinite(), 0).abs().max()), 1e-30) if x.numel() else 1.0
    gap = torch.where(x == y, 0.0, x.double() - y.double())  # equal infinities do not differ
    difference = float(gap.abs().max()) / largest if x.numel() else 0.0
    limit = math.sqrt(torch.finfo(dtype).eps)
    return difference <= limit, f"{difference:.1e} of the largest value (at most {limit:.1e})"


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the inputs of adapted layers, and operations on their weights outside of them."""

    def __init__(self, layers: Mapping[str, MergeableLinear]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers
        self.inputs: dict[str, tuple[Any, Any]] = {}
        self.read: set[str] = set()
        self._names = {
            id(tensor): name
            for name, layer in layers.items()
            for tensor in (layer.weight, *stored_tensors(layer.weight))
        }
        self._inside = 0
        self._patched: dict[str, Any] = {}

    def restart(self) -> None:
        self.inputs, self.read = {}, set()

    def __enter__(self) -> _Watch:
        for name, layer in self.layers.items():  # not hooks, which change the path that a parent takes
            self._patched[name] = vars(layer).get("forward")
            vars(layer)["forward"] = self._noting(name, layer.forward)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for name, layer in self.layers.items():
            del vars(layer)["forward"]
            if self._patched[name]:
                vars(layer)["forward"] = self._patched[name]

    def _noting(self, name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            self.inputs[name] = (args, kwargs)
            self._inside += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self._inside -= 1

        return run

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            for value in args:
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    if id(tensor) in self._names:
                        self.read.add(self._names[id(tensor)])
        return operation(*args, **(kwargs or {}))
