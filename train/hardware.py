"""The hardware: the device and precision of a run, its memory allocation, and its peak memory."""

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

from model.fast import DTYPES
from train.config import Recipe, RecipeError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a recipe. "auto" is CUDA if available. Raises RecipeError if there is no such device.

    local_rank: the index of the GPU for "cuda", since each process on a machine uses its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        if local_rank and local_rank == device.index:
            words = f"there is no GPU for process {local_rank + 1} of this machine, which has {count}"
            raise RecipeError(f"device: {words}")
        raise RecipeError(f'device: there is no {name} here; device = "auto" uses what is available')
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16. "auto" is bf16 if the hardware supports it, else fp16 on CUDA, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    can = torch.cpu.get_capabilities()
    return (
        "bf16" if any(can.get(feature, False) for feature in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"
    )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Context for mixed precision: matrix products in the given precision, the rest in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def set_deterministic(recipe: Recipe, device: torch.device) -> None:
    """Makes CUDA bitwise reproducible if the recipe asks for it."""
    if recipe.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory for the next step. Does nothing with another C library.

    By default malloc returns large freed tensors to the system, and the next step waits for zeroed pages:
    an eighth of a step of full fine-tuning, a hundredth of LoRA's (bench/NOTES.md). Peak memory stays within
    a few percent.
    """
    if libc := _glibc():
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Makes glibc's malloc return freed memory to the system once. Does nothing with another C library."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Context in which torch uses one CPU thread.

    Decomposing a matrix of a few hundred rows takes thousands of small steps. Threads that synchronise after
    each of them gain nothing on an idle machine and are ten times slower on a busy one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: torch.device) -> str:
    """The name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") or "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory so far: of the allocator on CUDA, of the process' resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
