"""Training steps side by side: made alike, timed in turn, and what each keeps in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from lora import LoraConfig, inject
from lora.frozen import FrozenLinear
from lora.parameters import train_only
from model import HEAD, load_base, speed_up
from train.hardware import autocast

CONFIG = LoraConfig(
    r=8, lora_alpha=16, lora_dropout=0.1, target_modules=("query", "value"), modules_to_save=HEAD
)
CLASSES = 4


@dataclass
class Contestant:
    """A model and its optimizer; `step` is forward, backward and optimizer on one fixed random batch."""

    name: str
    model: Any  # a transformers model, bare or inside PEFT's wrappers
    optimizer: torch.optim.Optimizer
    input_ids: torch.Tensor
    labels: torch.Tensor
    device: torch.device
    precision: str

    def forward(self) -> torch.Tensor:
        """The loss."""
        mask = torch.ones_like(self.input_ids)
        with autocast(self.device, self.precision):
            logits = self.model(input_ids=self.input_ids, attention_mask=mask).logits
        return F.cross_entropy(logits.float(), self.labels)

    def step(self) -> None:
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def contestant(
    kind: str, model_name: str, rows: int, length: int, precision: str, device: torch.device
) -> Contestant:
    """kind: "lora", "full" or "head", this project's; "peft", stock transformers under PEFT."""
    model: Any = load_base(model_name, num_labels=CLASSES)[0]
    if kind == "peft":
        model = with_peft(model)
    elif kind == "lora":
        inject(model, CONFIG)
    elif kind == "head":
        train_only(model, HEAD)
    model.to(device)
    if kind != "peft":
        speed_up(model, precision)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1000, 20000, (rows, length), generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator).to(device)
    return Contestant(kind, model, optimizer, input_ids, labels, device, precision)


def with_peft(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=CONFIG.r, lora_alpha=CONFIG.lora_alpha, lora_dropout=CONFIG.lora_dropout,
        target_modules=list(CONFIG.target_modules),
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def time_in_turn(
    tasks: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each task in each round; the rounds go A B C A B C, so that drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(-warm_up, rounds):
        for name, task in tasks.items():
            _synchronise(device)
            started = time.perf_counter()
            task()
            _synchronise(device)
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The ratio of the medians."""
    return statistics.median(numerator) / statistics.median(denominator)


def memory_bytes(entrant: Contestant) -> dict[str, int]:
    """What one step holds: weights, their copies, gradients, optimizer state, and what backward keeps.

    Activations are storages that autograd saved and that are no parameter, no copy of a weight, nor a
    cast of one (of a weight's shape, in a 16-bit dtype): those count as copies.
    """
    entrant.step()
    parameters = list(entrant.model.parameters())
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    copies = {}
    for module in entrant.model.modules():
        if isinstance(module, FrozenLinear) and module._copies is not None:
            for tensor in module._copies[1:]:
                if tensor is not None:
                    copies[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    shapes = {tuple(parameter.shape) for parameter in parameters if parameter.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    saved: dict[int, tuple[int, torch.Tensor]] = {}
    casts: dict[int, tuple[int, torch.Tensor]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in known and place not in copies:
            is_cast = tensor.element_size() == 2 and tuple(tensor.shape) in shapes
            (casts if is_cast else saved)[place] = (storage.nbytes(), tensor)  # held, so no address repeats
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = entrant.forward()
    activations, weight_casts = (sum(size for size, _ in kept.values()) for kept in (saved, casts))
    del loss
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return {
        "weights": sum(parameter.nbytes for parameter in parameters),
        "weight_copies": sum(copies.values()) + weight_casts,
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": sum(
            value.nbytes
            for state in entrant.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ),
        "activations": activations,
    }


def matrix_products(
    model: Any, rows: int, length: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """A LoRA step's own matrix products and nothing else: forward, and backward to the input.

    Four of a layer's width, two of the feed-forward, two products of attention forward and four
    backward. The first layer's three projections need no gradient of their input.
    """
    config = model.config
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    tokens = rows * length
    x, y = (
        torch.randn(tokens, width, dtype=dtype, device=device),
        torch.randn(tokens, inner, dtype=dtype, device=device),
    )
    layers = [
        (
            [torch.randn(width, width, dtype=dtype, device=device) for _ in range(4)],
            torch.randn(inner, width, dtype=dtype, device=device),
            torch.randn(width, inner, dtype=dtype, device=device),
        )
        for _ in range(config.num_hidden_layers)
    ]
    q = torch.randn(rows * heads, length, width // heads, dtype=dtype, device=device)
    p = torch.randn(rows * heads, length, length, dtype=dtype, device=device)

    def run() -> None:
        for squares, up, down in layers:
            for weight in squares:
                F.linear(x, weight)
            F.linear(x, up)
            F.linear(y, down)
            torch.bmm(q, q.transpose(1, 2))
            torch.bmm(p, q)
        for number, (squares, up, down) in enumerate(layers):
            for weight in squares if number else squares[:1]:
                x @ weight
            y @ up
            x @ down
            for _ in range(2):
                torch.bmm(q, q.transpose(1, 2))
                torch.bmm(p, q)

    return run


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
