"""What the hardware has: the device and the precision that a run uses, and the memory it took."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from train.config import Recipe, RecipeError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a recipe; "auto" is CUDA where there is one. Raises RecipeError if it is not there.

    local_rank: of several processes on one machine, each takes the GPU of its number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f'device: there is no {name} here; device = "auto" takes what there is')
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16. "auto" is bf16 where the hardware computes in it, else fp16 on CUDA, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    can = torch.cpu.get_capabilities()
    return (
        "bf16" if any(can.get(feature, False) for feature in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"
    )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision: products in the given precision, the rest in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def set_deterministic(recipe: Recipe, device: torch.device) -> None:
    """The same bits every time on CUDA too, if the recipe asks for it."""
    if recipe.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one; elsewhere it does nothing.

    By default large tensors go back to the system when they are freed, and the next step waits for it to
    hand out zeroed pages again: an eighth of full fine-tuning's step, a hundredth of LoRA's
    (bench/NOTES.md). The peak of memory stays within some percent; between peaks less is given back.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The CPU computes on one thread inside.

    A decomposition of a few hundred rows is thousands of small steps: threads that wait for each other
    after each of them gain nothing on an idle machine and lose tenfold on a busy one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") or "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory taken so far: the allocator's peak on CUDA, the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
