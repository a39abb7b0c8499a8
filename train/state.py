"""The progress counters of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class State:
    """The counters of a run. All but `seconds` are the same however often the run was stopped and resumed."""

    epoch: int = 0  # finished epochs
    step_in_epoch: int = 0  # optimizer steps in the current epoch
    step: int = 0
    best_epoch: int = 0  # counted from 1; 0: none yet
    best_accuracy: float = -1.0
    best_loss: float = math.inf
    examples: int = 0  # rows trained on
    tokens: int = 0  # of those rows, without padding
    padded_tokens: int = 0  # with padding, as computed
    skipped_steps: int = 0  # by float16's gradient scaler, after an overflow
    seconds: float = 0.0  # training steps and validation, over all resumed parts
    log_lines: int = 0
    log_digest: str = ""  # of these lines (train/runs.py)
    history: list[dict[str, float]] = field(default_factory=list)  # one row per epoch

    @property
    def epochs_since_best(self) -> int:
        return self.epoch - self.best_epoch
