"""Merging for a whole model: every layer or none.

    state       merge           unmerge          merged()                  disabled()
    unmerged    merges          error            merges, then unmerges     disables, then enables
    merged      error           unmerges         no change                 unmerges and disables,
                                                                           then enables and merges
    disabled    error           error            error                     no change

On exit, also by an exception, a context restores the state of each layer. A signal, such as Ctrl-C, takes
effect before or after a change of state. Threads that merge or unmerge at the same time do so one after
another. Both contexts change the model for all threads: a second thread may run the model inside the context
of the first, but cannot enter one.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.adapted import lora_layers, quantised_as, unmerged
from lora.interrupts import uninterrupted
from lora.mergeable import MergeableLinear
from lora.modules import unique_modules


def merge(model: nn.Module) -> None:
    """Merges every layer in place (MergeableLinear.merge). If one fails, none is merged.

    Raises RuntimeError if there is no adapter, or if a layer is merged, disabled, not writable, or shares
    the memory of its weight with another tensor; ValueError if a merged weight is not finite. The message
    names the layer.
    """
    layers = unmerged(lora_layers(model))
    refuse_shared(model, layers)
    _merge_all(layers)


def unmerge(model: nn.Module) -> None:
    """Restores the weight of every merged layer in place, bit for bit. Finishes an interrupted unmerge too.

    Raises RuntimeError if there is no adapter, no layer is merged, or a weight cannot be written to. In the
    last case every layer stays merged, and the message names the layer.
    """
    layers = lora_layers(model)
    with uninterrupted():
        merged_layers = {name: layer for name, layer in layers.items() if layer.merged}
        if not merged_layers:
            raise RuntimeError(f"{next(iter(layers))} is not merged; merge the model first")
        for name, layer in merged_layers.items():
            with naming(name):
                _check_writable(layer)
        for layer in merged_layers.values():
            layer.unmerge()


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which the model is merged.

    Raises RuntimeError or ValueError as `merge` does, RuntimeError if another thread is in a context.
    """
    layers = lora_layers(model)
    if not all(layer.enabled for layer in layers.values()):
        raise RuntimeError("merged() inside disabled(); leave the context first")
    refuse_shared(model, layers)
    with _restored(layers):
        _merge_all({name: layer for name, layer in layers.items() if not layer.merged})
        yield model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which the adapter is off. Modules named in modules_to_save stay as trained.

    Raises RuntimeError if the model has no adapter or another thread is in a context.
    """
    layers = lora_layers(model)
    with _restored(layers):
        with uninterrupted():
            for layer in layers.values():
                if layer.merged:
                    layer.unmerge()
                layer.enabled = False
        yield model


def _check_writable(layer: MergeableLinear) -> None:
    weight = layer._parameters.get("weight")
    if weight is None:
        raise RuntimeError("the weight is not a Parameter; remove its pruning or parametrization first")
    if kind := quantised_as(weight):
        why = f"the weight is stored as {kind}: rounding W + ΔW to {kind} again would lose a part of ΔW"
        raise RuntimeError(f"{why}; use eject(model, merge=True, dtype=torch.float32)")
    if weight.is_meta:
        raise RuntimeError("the weight is on the meta device, so it has no values")
    if reason := why_not_writable(weight):
        raise RuntimeError(f"the weight is {reason}")


def why_not_writable(tensor: Tensor) -> str:
    """Why the values of a tensor cannot be changed, or an empty string if they can."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "a tensor of inference mode, which cannot be written to outside"
    reach = 0  # distance from the first to the last element of the dimensions so far
    if tensor.layout == torch.strided:
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1 and stride <= reach:
                return "an expanded or overlapping view, whose elements share memory"
            reach += (size - 1) * stride
    return ""


def refuse_shared(model: nn.Module, layers: dict[str, MergeableLinear]) -> None:
    """Raises RuntimeError if an adapted weight shares memory with another tensor."""
    spans: list[tuple[str, int, int, str, Tensor]] = []  # device, first and last byte, name, tensor
    for name, module in unique_modules(model).items():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(module, MergeableLinear) and hasattr(tensor, "full_tensor"):
                raise RuntimeError(f"{name}.{key} is sharded by FSDP; merge before, or in an unwrapped model")
            if (
                tensor is not None
                and tensor.numel()
                and tensor.layout == torch.strided
                and not tensor.is_meta
                and not quantised_as(tensor)  # quantised: nothing shares it, and it is never written to
            ):
                sizes = zip(tensor.shape, tensor.stride(), strict=True)
                reach = 1 + sum((size - 1) * stride for size, stride in sizes)
                start = tensor.data_ptr()
                stop = start + reach * tensor.element_size()
                spans.append((str(tensor.device), start, stop, f"{name}.{key}".lstrip("."), tensor))
    spans.sort(key=lambda span: span[:3])
    weights = {layer.weight for layer in layers.values()}
    widest = ("", 0, 0, "", torch.empty(0))
    for span in spans:
        if span[0] == widest[0] and span[1] < widest[2]:
            if span[4] in weights or widest[4] in weights:
                raise RuntimeError(
                    f"{widest[3]} and {span[3]} share one weight or a part of it, which differ after merging"
                )
            widest = max(widest, span, key=lambda each: each[2])
        else:
            widest = span


def _merge_all(layers: dict[str, MergeableLinear]) -> None:
    with uninterrupted():
        started: list[MergeableLinear] = []
        try:
            for name, layer in layers.items():
                with naming(name):
                    _check_writable(layer)
                    started.append(layer)  # before the merge, so that an interrupted merge is undone too
                    layer.merge()
        except BaseException:
            for layer in started:
                if layer.merged:
                    layer.unmerge()
            raise


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Context that puts the layer's name before the message of an error."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{name}: {error}") from error


@contextmanager
def _restored(layers: dict[str, MergeableLinear]) -> Iterator[None]:
    """Context that restores on exit which layers are merged and which are enabled."""
    before: dict[str, tuple[bool, bool]] = {}

    def restore() -> None:
        for name, layer in layers.items():
            was_merged, layer.enabled = before[name]
            if layer.merged and not was_merged:
                layer.unmerge()
        _merge_all({name: layer for name, layer in layers.items() if before[name][0] and not layer.merged})

    with _one_thread(layers):
        # Read only now, because another thread may just have left a context.
        before |= {name: (layer.merged, layer.enabled) for name, layer in layers.items()}
        with restoring(restore):
            yield


_threads: weakref.WeakKeyDictionary[MergeableLinear, int] = weakref.WeakKeyDictionary()
_threads_lock = threading.Lock()


@contextmanager
def _one_thread(layers: dict[str, MergeableLinear]) -> Iterator[None]:
    """Context that only one thread at a time can enter for a layer, any number of times."""
    entered: list[MergeableLinear] = []

    def leave() -> None:
        for layer in entered:
            _threads.pop(layer, None)

    with restoring(leave):
        with uninterrupted(), _threads_lock:
            thread = _owner()
            if any(_threads.get(layer, thread) != thread for layer in layers.values()):
                raise RuntimeError("another thread or task is inside merged() or disabled() of this model")
            entered += [layer for layer in layers.values() if layer not in _threads]
            _threads.update(dict.fromkeys(entered, thread))
        yield


def _owner() -> int:
    """The running asyncio task, or otherwise the thread: tasks of a thread leave contexts in any order."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop
        task = None
    return threading.get_ident() if task is None else id(task)


@contextmanager
def restoring(restore: Callable[[], None]) -> Iterator[None]:
    """Context that calls `restore` on exit, also if a signal interrupts the exit itself."""
    once = _Once(restore)
    try:
        yield
    finally:
        once()


class _Once:
    """Calls a function once: at the latest when the object is freed, which an interrupted exit causes."""

    def __init__(self, function: Callable[[], None]):
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        with uninterrupted():
            function, self._function = self._function, None
            if function is not None:
                function()

    def __del__(self) -> None:
        if self._function is not None:  # Python ignores a KeyboardInterrupt here, so do as little as possible
            self()
