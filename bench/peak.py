"""python -m bench.peak KIND MODEL ROWS LENGTH PRECISION: the memory of one model, in its own process."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from bench.steps import make_model, memory_bytes
from train.hardware import keep_freed_memory, peak_memory_bytes, resolve_device, return_freed_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = 3


def main(arguments: list[str] | None = None) -> int:
    """Prints JSON: bytes by component, bytes of the process without a model, and the peak of STEPS steps.

    bare_bytes: with the libraries loaded and no model. peak_bytes: the peak of the resident set; on CUDA,
    of the allocator. peak_of: "steps", or "process" if the system cannot reset an earlier peak.
    """
    kind, model_name, rows, length, precision = sys.argv[1:] if arguments is None else arguments
    keep_freed_memory()
    device = resolve_device("auto")
    bare = resident_bytes(device)
    model = make_model(kind, model_name, int(rows), int(length), precision, device)
    components = memory_bytes(model)
    gc.collect()
    return_freed_memory()  # such as the float32 weights that a quantised model was made from
    was_reset = _reset_peak(device)
    for _ in range(STEPS):
        model.step()
    result = {
        "components": components,
        "bare_bytes": bare,
        "peak_bytes": _peak_bytes(device),
        "peak_of": "steps" if was_reset else "process",
    }
    print(json.dumps(result))
    return 0


def resident_bytes(device: torch.device) -> int:
    """The memory of the process now: on CUDA, of the allocator; otherwise the resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or peak_memory_bytes(device)


def _peak_bytes(device: torch.device) -> int:
    return (device.type == "cpu" and _status("VmHWM")) or peak_memory_bytes(device)


def _reset_peak(device: torch.device) -> bool:
    """Resets the peak to the present value. Returns whether the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # proc(5): resets the peak of the resident set
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """A field of Linux's /proc/self/status in bytes, 0 if there is none."""
    if not _STATUS.is_file():
        return 0
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == f"{field}:"), 0)


if __name__ == "__main__":
    sys.exit(main())
