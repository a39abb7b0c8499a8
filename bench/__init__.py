"""What LoRA costs and saves, measured. The results are in RESULTS."""

from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def results_folder(device: torch.device) -> Path:
    """The folder of results: bench/results for the CPU, bench/results/cuda for CUDA."""
    return RESULTS if device.type == "cpu" else RESULTS / device.type
