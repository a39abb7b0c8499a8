"""Training steps side by side: made alike, timed in turn, and what each keeps in memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from bench.rivals import RIVALS
from lora import LoraConfig, inject
from lora.frozen import FrozenLinear
from lora.parameters import train_only
from model import HEAD, load_base, speed_up
from train.hardware import autocast

QUERY_VALUE = ("query", "value")
ALL_LINEAR = ("query", "key", "value", "intermediate.dense", "output.dense")
CONFIG = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=QUERY_VALUE, modules_to_save=HEAD)
CLASSES = 4
MODES = {"full": "full fine-tuning", "lora": "LoRA", "head": "head only"}
PHASES = ("forward", "backward", "optimizer")
SHAPES = (("random:roberta-base", 16, 64), ("minilm", 32, 56))  # model, rows, tokens a row
QUICK_SHAPES = (("random:minilm", 2, 16),)

Name = TypeVar("Name", bound=Hashable)
T = TypeVar("T")


@dataclass
class Contestant:
    """A model and its optimizer; `step` is forward, backward and optimizer on one fixed random batch."""

    name: str
    model: Any  # a transformers model, bare or inside PEFT's wrappers
    optimizer: torch.optim.Optimizer
    input_ids: Tensor
    labels: Tensor
    device: torch.device
    precision: str

    def forward(self) -> Tensor:
        """The loss."""
        with autocast(self.device, self.precision):
            logits = self.model(input_ids=self.input_ids).logits  # nothing is padded, so there is no mask
        return F.cross_entropy(logits.float(), self.labels)

    def step(self) -> list[float]:
        """One step of training; the seconds of its PHASES."""
        watch = Stopwatch(self.device)
        loss = self.forward()
        watch.mark()
        loss.backward()  # type: ignore[no-untyped-call]
        watch.mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        watch.mark()
        return watch.seconds()


def contestant(
    kind: str,
    model_name: str,
    rows: int,
    length: int,
    precision: str,
    device: torch.device,
    config: LoraConfig = CONFIG,
) -> Contestant:
    """kind: "lora", "full" or "head", this project's; "peft" or "loralib", stock transformers under them.

    Ours get everything that makes them faster and applies to them: `speed_up`, and the fused AdamW.
    """
    model: Any = load_base(model_name, num_labels=CLASSES)[0]
    if kind in RIVALS:
        model = RIVALS[kind](model, config)
    elif kind == "lora":
        inject(model, config)
    elif kind == "head":
        train_only(model, HEAD)
    model.to(device)
    if kind not in RIVALS:
        speed_up(model, precision)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    input_ids, labels = random_batch(rows, length, device)
    return Contestant(kind, model, optimizer, input_ids, labels, device, precision)


def random_batch(rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (rows, length) and labels (rows,), always the same ones."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1000, 20000, (rows, length), generator=generator)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return input_ids.to(device), labels.to(device)


@torch.no_grad()
def randomise(lora_B: Mapping[str, Tensor], seed: int = 0) -> None:
    """Fills B, by layer, as large as training makes it: ΔW is then some percent of W."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(lora_B):
        lora_B[name].copy_(0.02 * torch.randn(lora_B[name].shape, generator=generator))


class Stopwatch:
    """The seconds between marked moments, the first being its making.

    On CUDA the moments are events in the device's own queue, so that marking one waits for nothing.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._moments: list[Any] = []
        synchronise(device)
        self.mark()

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """A number for each mark: the time since the one before. Waits for the device."""
        synchronise(self._device)
        pairs = itertools.pairwise(self._moments)
        if self._device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def in_turn(tasks: dict[Name, Callable[[], T]], rounds: int, warm_up: int = 2) -> dict[Name, list[T]]:
    """What each task gives in each round; the rounds go A B C A B C, so that drift meets all alike."""
    results: dict[Name, list[T]] = {name: [] for name in tasks}
    for round_number in tqdm(range(-warm_up, rounds), unit=" rounds", leave=False, disable=None):
        for name, task in tasks.items():
            result = task()
            if round_number >= 0:
                results[name].append(result)
    return results


def time_in_turn(
    tasks: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each task in each round, the rounds as in `in_turn`."""
    return in_turn({name: partial(time_once, task, device) for name, task in tasks.items()}, rounds, warm_up)


def time_once(task: Callable[[], object], device: torch.device) -> float:
    """The task's seconds."""
    watch = Stopwatch(device)
    task()
    watch.mark()
    return watch.seconds()[0]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The ratio of the medians.

    Over rounds drawn anew from a run's own, it varied as little as the median of the rounds' ratios did,
    and a reader can recompute it from the medians beside it.
    """
    return statistics.median(numerator) / statistics.median(denominator)


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """The median with its spread, the first and third quartile, and the least; from seconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    found = {"median": middle, "low": low, "high": high, "least": min(seconds)}
    return {name: round(1e3 * value, 3) for name, value in found.items()}


def memory_bytes(entrant: Contestant) -> dict[str, int]:
    """What one step holds: weights, their copies, gradients, optimizer state, and what backward keeps.

    The last is activations and casts of weights (of a weight's shape, in a 16-bit dtype): storages that
    autograd saved and that are no parameter and no copy that stays.
    """
    entrant.step()
    parameters = list(entrant.model.parameters())
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    copies = {}
    for module in entrant.model.modules():
        if isinstance(module, FrozenLinear):
            for tensor in module.copies:
                copies[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    shapes = {tuple(parameter.shape) for parameter in parameters if parameter.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    saved: dict[int, tuple[int, Tensor]] = {}
    casts: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # itself would hold the graph, which holds this function: never freed
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
        "weight_copies": sum(copies.values()),
        "weight_casts": weight_casts,
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": sum(
            value.nbytes
            for state in entrant.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ),
        "activations": activations,
    }


def held_bytes(parts: Mapping[str, int]) -> int:
    """The most of `memory_bytes`' parts that a step holds at once.

    Gradients come as backward lets go of what it kept, activations and casts of weights, so the smaller
    of the two is not counted.
    """
    return sum(parts.values()) - min(parts["gradients"], parts["activations"] + parts["weight_casts"])


class Products:
    """A step's own matrix products and nothing else; calling it computes them once. flops: of one call."""

    def __init__(self, factors: list[tuple[Tensor, Tensor]]):
        self._factors = factors
        # (…, n, k) times (…, k, m): n·k·m multiplications and as many additions
        self.flops = sum(2 * a.numel() * b.shape[-1] for a, b in factors)

    def __call__(self) -> None:
        for a, b in self._factors:
            a @ b


def matrix_products(
    model: Any, rows: int, length: int, dtype: torch.dtype, device: torch.device, kind: str = "lora"
) -> Products:
    """The encoder's products in one step: forward; for LoRA on query and value and for full fine-tuning
    backward to the input; for full fine-tuning backward to the weights. LoRA's own thin products are left
    out.

    Four of a layer's width, two of the feed-forward, two products of attention forward and four
    backward. With frozen weights the first layer's three projections need no gradient of their input, nor
    do its keys. The last layer computes all but key and value for the first token alone.
    """
    config = model.config
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    layers = [
        ([random(width, width) for _ in range(4)], random(inner, width), random(width, inner))
        for _ in range(config.num_hidden_layers)
    ]
    x, q = random(rows * length, width), random(rows * heads, length, width // heads)
    factors: list[tuple[Tensor, Tensor]] = []
    for number, (squares, up, down) in enumerate(layers):
        first, tokens = number == 0, 1 if number == len(layers) - 1 else length
        key_value, query_output = squares[:2], squares[2:]
        z, y = random(rows * tokens, width), random(rows * tokens, inner)
        g, p = random(rows * heads, tokens, width // heads), random(rows * heads, tokens, length)
        factors += [(x, weight.t()) for weight in key_value] + [(z, weight.t()) for weight in query_output]
        factors += [(z, up.t()), (y, down.t()), (g, q.transpose(1, 2)), (p, q)]
        if kind == "head":
            continue
        factors += [(y, up), (z, down), (g, q.transpose(1, 2)), (p, q), (p.transpose(1, 2), g)]
        if kind == "full" or not first:
            factors += [(x, weight) for weight in key_value] + [(z, weight) for weight in query_output]
            factors += [(p.transpose(1, 2), g)]
        else:
            factors += [(z, query_output[0])]
        if kind == "full":
            factors += [(x.t(), x)] * 2 + [(z.t(), z)] * 2 + [(y.t(), z), (z.t(), y)]
    return Products(factors)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
