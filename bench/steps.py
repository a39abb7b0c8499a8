"""Training steps to compare: built alike, timed in interleaved rounds, and their memory by component."""

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

from bench.baselines import BASELINES, state_tensors, with_peft_nf4
from lora import LoraConfig, inject
from lora.fast import FastLinear
from lora.modules import train_only
from lora.quantised import PRECISIONS, quantise
from lora.quantised.tensor import QuantisedTensor, stored_tensors
from model import HEAD, load_base, speed_up
from model.fast import DTYPES
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
class BenchModel:
    """A model and its optimizer. `step` is forward, backward and optimizer on one fixed random batch."""

    name: str
    module: Any  # a transformers model, bare or in PEFT's wrapper
    optimizer: torch.optim.Optimizer
    input_ids: Tensor
    labels: Tensor
    device: torch.device
    precision: str

    def forward(self) -> Tensor:
        """The loss."""
        with autocast(self.device, self.precision):
            logits = self.module(input_ids=self.input_ids).logits  # no padding, so no mask
        return F.cross_entropy(logits.float(), self.labels)

    def step(self) -> list[float]:
        """Runs one training step. Returns the seconds of its PHASES."""
        watch = Stopwatch(self.device)
        loss = self.forward()
        watch.mark()
        loss.backward()  # type: ignore[no-untyped-call]
        watch.mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        watch.mark()
        return watch.seconds()


def make_model(
    kind: str,
    model_name: str,
    rows: int,
    length: int,
    precision: str,
    device: torch.device,
    config: LoraConfig = CONFIG,
) -> BenchModel:
    """Builds a model to compare. kind: "lora", "full" or "head" of this project, or "peft" or "loralib".

    One of lora.quantised.PRECISIONS is LoRA here on a base that is stored so, and "peft-nf4" is PEFT on one
    that bitsandbytes has stored in NF4. The models of this project are sped up by `speed_up`; the baselines
    use transformers' layers. All use the fused AdamW.
    """
    model: Any = load_base(model_name, num_labels=CLASSES)[0]
    ours = kind not in (*BASELINES, "peft-nf4")
    if kind == "peft-nf4":
        model = with_peft_nf4(model, config, DTYPES[precision])
    elif kind in BASELINES:
        model = BASELINES[kind](model, config)
    elif kind == "lora" or kind in PRECISIONS:
        quantise(model, "fp32" if kind == "lora" else kind, keep=HEAD)
        inject(model, config)
    elif kind == "head":
        train_only(model, HEAD)
    model.to(device)
    if ours:
        speed_up(model, precision)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    input_ids, labels = random_batch(rows, length, device)
    return BenchModel(kind, model, optimizer, input_ids, labels, device, precision)


def random_batch(rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (rows, length) and labels (rows,), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1000, 20000, (rows, length), generator=generator)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return input_ids.to(device), labels.to(device)


@torch.no_grad()
def randomise(lora_B: Mapping[str, Tensor], seed: int = 0) -> None:
    """Fills B with random values as large as training makes them: ΔW is a few percent of W."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(lora_B):
        lora_B[name].copy_(0.02 * torch.randn(lora_B[name].shape, generator=generator))


class Stopwatch:
    """Measures the seconds between marks. The first mark is set by the constructor.

    On CUDA the marks are events in the stream, so that setting one does not wait for the device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[Any] = []
        synchronise(device)
        self.mark()

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """For each mark, the time since the previous one. Waits for the device."""
        synchronise(self._device)
        pairs = itertools.pairwise(self._marks)
        if self._device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def in_turn(tasks: dict[Name, Callable[[], T]], rounds: int, warm_up: int = 2) -> dict[Name, list[T]]:
    """Runs the tasks in rounds (A B C, A B C), so that drift affects all alike. Returns results by task."""
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
    """The seconds of each task in each round, in rounds as in `in_turn`."""
    return in_turn({name: partial(time_once, task, device) for name, task in tasks.items()}, rounds, warm_up)


def time_once(task: Callable[[], object], device: torch.device) -> float:
    """The seconds that the task takes."""
    watch = Stopwatch(device)
    task()
    watch.mark()
    return watch.seconds()[0]


def ratio(numerator: Mapping[str, float], denominator: Mapping[str, float]) -> float:
    """The ratio of the medians of two results of `milliseconds`.

    In bootstrap samples it varied as little as the median of the rounds' ratios, and a reader can
    recompute it from the published medians.
    """
    return numerator["median"] / denominator["median"]


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """The median, the first and third quartile and the minimum of some seconds, in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    found = {"median": middle, "low": low, "high": high, "least": min(seconds)}
    return {name: round(1e3 * value, 3) for name, value in found.items()}


def memory_bytes(model: BenchModel) -> dict[str, int]:
    """The memory of one step by component: weights, copies, gradients, optimizer state, saved tensors.

    Saved tensors are the storages that autograd saves for backward, other than Parameters and permanent
    copies. They are divided into activations and casts of weights, which have the shape of a weight and a
    16-bit dtype.
    """
    model.step()
    parameters = list(model.module.parameters())
    # Frozen matrices of some variants of LoRA are buffers.
    weights = parameters + [buffer for buffer in model.module.buffers() if buffer.is_floating_point()]
    stored = [t for weight in weights for t in (*stored_tensors(weight), *state_tensors(weight))]
    known = {tensor.untyped_storage().data_ptr() for tensor in stored}
    copies = {}
    for module in model.module.modules():
        if isinstance(module, FastLinear):
            for tensor in module.copies:
                copies[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    shapes = {tuple(weight.shape) for weight in weights if weight.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    saved: dict[int, tuple[int, Tensor]] = {}
    casts: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        if isinstance(tensor, QuantisedTensor):  # a weight
            return tensor
        tensor = tensor.detach()  # the tensor itself would keep the graph alive, and with it this function
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in known and address not in copies:
            is_cast = tensor.element_size() == 2 and tuple(tensor.shape) in shapes
            (casts if is_cast else saved)[address] = (storage.nbytes(), tensor)  # kept: no address is reused
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.forward()
    activations, weight_casts = (sum(size for size, _ in kept.values()) for kept in (saved, casts))
    del loss
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return {
        "weights": sum(tensor.nbytes for tensor in stored),
        "weight_copies": sum(copies.values()),
        "weight_casts": weight_casts,
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": sum(
            value.nbytes
            for state in model.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ),
        "activations": activations,
    }


def held_bytes(parts: Mapping[str, int]) -> int:
    """The largest sum of `memory_bytes`' components that a step holds at once.

    Backward frees activations and casts of weights while it allocates gradients, so only the larger of the
    two is counted.
    """
    return sum(parts.values()) - min(parts["gradients"], parts["activations"] + parts["weight_casts"])


class Products:
    """The matrix products of a step alone; calling the object computes them once. flops: of one call."""

    def __init__(self, factors: list[tuple[Tensor, Tensor]]):
        self._factors = factors
        # (…, n, k) @ (…, k, m): n·k·m multiplications and n·k·m additions
        self.flops = sum(2 * a.numel() * b.shape[-1] for a, b in factors)

    def __call__(self) -> None:
        for a, b in self._factors:
            a @ b


def matrix_products(
    model: Any, rows: int, length: int, dtype: torch.dtype, device: torch.device, kind: str = "lora"
) -> Products:
    """The matrix products of the encoder in one step, without LoRA's thin products.

    They are forward; for LoRA on query and value and for full fine-tuning also backward to the input; for
    full fine-tuning also backward to the weights. A layer has four products of its width, two of the
    feed-forward, and for attention two in forward and four in backward. With frozen weights, the first
    layer's projections need no gradient of their input, and its keys need none. The last layer computes
    everything but keys and values for the first token alone.
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
