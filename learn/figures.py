"""python -m learn.figures: draws the figures of the course, and writes them to learn/figures/."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn

mpl.use("Agg")  # files only, no window
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

from learn.checks.models import HEAD, roberta_base_shapes
from lora import LoraConfig, count_parameters, inject
from lora.quantised import quantise
from lora.quantised.nf4 import BLOCK, LEVELS, NF4
from lora.rounding import round_to
from model import load_base
from train.data import load_news

FOLDER = Path(__file__).parent / "figures"
ANATOMY = Path(__file__).parent.parent / "bench" / "results" / "anatomy.json"
BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#c8691c", "#2f8a57", "#8a929b"
# 800 pixels wide. At half of that, the width of a phone, 12 points are 17 pixels high.
STYLE: Any = {
    "font.size": 12, "axes.titlesize": 12, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "figure.figsize": (4.8, 3.3), "savefig.dpi": 167,
}  # fmt: skip


def main() -> None:
    """Draws every figure. The same machine draws the same bytes."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        with plt.rc_context(STYLE):
            torch.manual_seed(0)
            figure = draw()
            figure.tight_layout(pad=0.4)
            figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None})
            plt.close(figure)


def low_rank() -> Any:
    """ΔW as the product of a tall and a wide matrix."""
    figure, axes = _canvas(13.2, 7)
    for x, y, width, height, color, name, size in (
        (0.3, 1.2, 5, 5, GREY, "ΔW", "768 x 768\n589,824"),
        (7.0, 1.2, 0.5, 5, ORANGE, "B", "768 x 8\n6,144"),
        (7.9, 5.7, 5, 0.5, BLUE, "A", "8 x 768\n6,144"),
    ):
        axes.add_patch(Rectangle((x, y), width, height, color=color, alpha=0.85))
        below = y - 0.25
        axes.text(x + width / 2, below, size, ha="center", va="top", fontsize=11)
        inside = name == "ΔW"
        axes.text(
            x + width / 2, y + height / 2 if inside else y + height + 0.15, name, ha="center",
            va="center" if inside else "bottom", fontsize=15, color="white" if inside else "black",
        )  # fmt: skip
    axes.text(6.1, 3.7, "=", ha="center", va="center", fontsize=20)
    return figure


def parameters() -> Any:
    """Elements of A and B by rank, and where they exceed W's."""
    figure, axes = plt.subplots()
    ranks = range(1, 769)
    axes.loglog(ranks, [r * 2 * 768 for r in ranks], color=BLUE, lw=2.5)
    axes.axhline(768 * 768, color=GREY, ls="--", lw=2)
    axes.text(1, 768 * 768 * 1.15, "W: 589,824", va="bottom", color=GREY)
    axes.plot([384], [768 * 768], "o", color=ORANGE, ms=9)
    axes.text(110, 768 * 768 * 0.75, "r = 384: no saving", ha="right", va="top", color=ORANGE)
    axes.plot([8], [12288], "o", color=ORANGE, ms=9)
    axes.text(10, 9500, "r = 8: 12,288", va="center", color=ORANGE)
    axes.set(xlabel="rank r", ylabel="elements of A and B", title="A layer of 768 x 768", ylim=(1000, 2e6))
    return figure


def first_steps() -> Any:
    """Gradient norms of A and B from the first step on, in a small regression."""
    x, target = torch.randn(256, 32), torch.randn(256, 32) @ torch.randn(32, 32) / 6
    A = (torch.rand(4, 32) * 2 - 1).div(32**0.5).requires_grad_()
    B = torch.zeros(32, 4, requires_grad=True)
    optimizer = torch.optim.Adam([A, B], lr=0.01)
    norms = []
    for _ in range(15):
        optimizer.zero_grad()
        ((x @ A.T) @ B.T - target).square().mean().backward()  # type: ignore[no-untyped-call]
        assert A.grad is not None
        assert B.grad is not None
        norms.append((float(A.grad.norm()), float(B.grad.norm())))
        optimizer.step()
    figure, axes = plt.subplots()
    steps = range(1, len(norms) + 1)
    axes.plot(steps, [b for _, b in norms], "o-", color=ORANGE, label="gradient of B")
    axes.plot(steps, [a for a, _ in norms], "o-", color=BLUE, label="gradient of A")
    axes.annotate(
        "exactly 0 in step 1", (1, 0), (3.5, 0.0005), va="center", color=BLUE,
        arrowprops={"arrowstyle": "->", "color": BLUE},
    )  # fmt: skip
    axes.set(xlabel="step", ylabel="norm", ylim=(-0.001, 0.03))
    axes.legend(loc="upper right", ncols=2)
    return figure


def forward() -> Any:
    """The two paths of the forward pass."""
    figure, axes = _canvas(12, 7.2)
    _box(axes, 0.1, 3.0, 1.2, "x", GREY)
    _box(axes, 3.9, 5.0, 3.4, "W·x + b", GREY, "frozen")
    _box(axes, 2.2, 1.0, 2.5, "dropout", GREEN, "training only")
    _box(axes, 5.4, 1.0, 1.1, "A", BLUE, "r x in")
    _box(axes, 7.2, 1.0, 1.1, "B", ORANGE, "out x r")
    _box(axes, 9.0, 1.0, 1.5, "· α/r", GREEN)
    _box(axes, 10.7, 3.0, 1.2, "+  h", GREY)
    for start, end in (
        ((0.9, 4.1), (3.9, 5.5)), ((7.3, 5.5), (11.0, 4.1)), ((0.9, 3.0), (2.2, 1.6)),
        ((4.7, 1.5), (5.4, 1.5)),
        ((6.5, 1.5), (7.2, 1.5)), ((8.3, 1.5), (9.0, 1.5)), ((10.5, 1.6), (11.2, 3.0)),
    ):  # fmt: skip
        _arrow(axes, start, end)
    return figure


def backward() -> Any:
    """What each gradient is made of, with shapes."""
    figure, axes = _canvas(12, 8.1)
    axes.text(0.1, 7.6, "n rows,  g = gradient of h", fontsize=12, va="center")
    rows = (
        ("s·g", "(n, out)", "·  B", "(out, r)", "=  t", "(n, r)", GREY),
        ("tᵀ", "(r, n)", "·  x∘keep", "(n, in)", "=  grad A", "(r, in)", BLUE),
        ("s·gᵀ", "(out, n)", "·  (x∘keep)·Aᵀ", "(n, r)", "=  grad B", "(out, r)", ORANGE),
        ("g·W", "(n, in)", "+  (t·A)∘keep", "(n, in)", "=  grad x", "(n, in)", GREEN),
    )
    for number, (*words, color) in enumerate(rows):
        y = 6.3 - 1.75 * number
        axes.add_patch(Rectangle((0, y - 0.85), 12, 1.55, color=color, alpha=0.13))
        for x, symbol, shape in ((0.3, *words[:2]), (3.3, *words[2:4]), (8.1, *words[4:])):
            axes.text(x, y + 0.15, symbol, fontsize=14, va="center")
            axes.text(x, y - 0.5, shape, fontsize=11, va="center", color="#444444")
    return figure


def counts() -> Any:
    """Parameters of roberta-base by role."""
    count = count_parameters(roberta_base_shapes(), head=(HEAD,))
    figure, axes = plt.subplots(figsize=(4.8, 2.4))
    rows = (("frozen", count.frozen, GREY), ("head", count.head, GREEN), ("LoRA", count.lora, BLUE))
    for y, (_, number, color) in enumerate(rows):
        axes.barh(y, number, color=color)
        inside = number > 1e7
        axes.text(
            number / 1.3 if inside else number * 1.3, y, f"{number:,}", va="center",
            ha="right" if inside else "left", color="white" if inside else "black",
        )  # fmt: skip
    axes.set_yticks(range(3), [row[0] for row in rows])
    axes.set(
        xscale="log",
        xlim=(1e4, 2e8),
        xlabel="parameters, logarithmic",
        title="roberta-base, r = 8, 4 classes",
    )
    return figure


def rounding() -> Any:
    """Errors of merged weights in units of the last place, with one and with two roundings."""
    W = torch.randn(512, 512).bfloat16()
    delta = 0.1 * torch.randn(512, 4).double() @ torch.randn(4, 512).double()
    exact = W.double() + delta
    once = round_to(exact, torch.bfloat16)
    twice = W + delta.to(torch.bfloat16)
    figure, axes = plt.subplots()
    bins = torch.linspace(-1, 1, 81).tolist()
    for label, merged, color in (("ΔW rounded first", twice, ORANGE), ("one rounding", once, BLUE)):
        axes.hist(_ulps(merged.double() - exact, exact), bins=bins, color=color, alpha=0.75, label=label)
    axes.set(xlabel="error, in steps of bfloat16", ylabel="weights", yscale="log")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=2, columnspacing=1, handlelength=1)
    return figure


def drift() -> Any:
    """Weights that subtraction does not restore, by number of adapters."""
    figure, axes = plt.subplots()
    numbers = [1, 2, 5, 10, 20, 50, 100]
    for dtype, color in ((torch.bfloat16, ORANGE), (torch.float32, GREEN)):
        W = torch.randn(256, 256).to(dtype)
        moving, shares = W.clone(), []
        for number in range(1, numbers[-1] + 1):
            delta = (0.1 * torch.randn(256, 256)).to(dtype)
            moving = (moving + delta) - delta
            if number in numbers:
                shares.append(100 * float((moving != W).double().mean()))
        name = str(dtype).removeprefix("torch.")
        axes.plot(numbers, shares, "o-", color=color, label=f"subtracted, {name}")
    axes.plot(numbers, [0.0] * len(numbers), "o-", color=BLUE, label="restored from a copy")
    axes.set(xlabel="adapters merged and unmerged in turn", ylabel="weights changed, %", xscale="log")
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.set_ylim(-4, 100)
    axes.legend(loc="upper left", fontsize=11)
    return figure


def rank() -> Any:
    """Test accuracy of the quickstart's adapter, cut to lower ranks; measured by `make bench`."""
    rows = json.loads(ANATOMY.read_text(encoding="utf-8"))["truncated"]
    figure, axes = plt.subplots()
    axes.plot([row["rank"] for row in rows], [100 * row["accuracy"] for row in rows], "o-", color=BLUE)
    axes.set(
        xlabel="rank that is left of ΔW",
        ylabel="test accuracy, %",
        title="A trained adapter of rank 8 after cutting",
    )
    axes.grid(alpha=0.3)
    return figure


def nf4_levels() -> Any:
    """The numbers of a real weight over the absmax of their blocks, and NF4's levels."""
    scaled = _layer()[0].reshape(-1, BLOCK)
    scaled = scaled / scaled.abs().amax(dim=1, keepdim=True)
    figure, axes = plt.subplots()
    axes.hist(scaled.flatten().numpy(), bins=200, range=(-1, 1), density=True, color=GREY)
    axes.vlines(LEVELS, 0, 1.45, color=ORANGE, lw=1)
    axes.annotate(
        "one ±1 in each block", (0.985, 0.9), (0.3, 1.6), color="#444444", fontsize=11,
        arrowprops={"arrowstyle": "->", "color": "#444444"},
    )  # fmt: skip
    axes.set(xlabel="w / absmax of its block", ylabel="density", ylim=(0, 1.8), xlim=(-1.03, 1.03))
    axes.set_title("MiniLM, a query layer; orange: the 16 levels", fontsize=11)
    return figure


def nf4_error() -> Any:
    """By level: the share of the numbers that are rounded to it, and their share of the squared error."""
    weight = _layer()[0]
    stored = NF4.quantise(weight)
    codes = torch.stack([stored.codes >> 4, stored.codes & 15], dim=1).flatten().long()
    squares = (weight - stored.dequantise()).square().flatten()
    numbers = torch.bincount(codes, minlength=16) / len(codes)
    errors = torch.zeros(16).index_add(0, codes, squares) / squares.sum()
    figure, axes = plt.subplots()
    at = torch.arange(16)
    axes.bar(at - 0.2, 100 * numbers, width=0.4, color=GREY, label="numbers")
    axes.bar(at + 0.2, 100 * errors, width=0.4, color=ORANGE, label="squared error")
    axes.set_xticks(range(0, 16, 3), [f"{LEVELS[level]:.2f}" for level in range(0, 16, 3)])
    axes.set(xlabel="level", ylabel="share, %", yticks=[0, 5, 10])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2)
    return figure


def nf4_rank() -> Any:
    """The error of a layer's outputs that is left after the best update of each rank, and after training."""
    weight, x = _layer()
    error = (weight - NF4.quantise(weight).dequantise()).double()
    values, vectors = torch.linalg.eigh(x.double().T @ x.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # ‖E·root‖ = ‖E·xᵀ‖
    figure, axes = plt.subplots()
    ranks = range(1, 385)
    for matrix, color, name in (
        (error, GREY, "best for all inputs"),
        (error @ root, BLUE, "best for real ones"),
    ):
        squares = torch.linalg.svdvals(matrix).square()
        left = (1 - squares.cumsum(0) / squares.sum()).clamp(min=0).sqrt()
        axes.plot(ranks, 100 * left, color=color, lw=2.5, label=name)
    trained = [(r, 100 * _left_by_training(weight, x, r)) for r in (2, 8, 32)]
    axes.plot(*zip(*trained, strict=True), "o", color=ORANGE, ms=8, label="LoRA, trained")
    axes.set(xscale="log", xlabel="rank", ylabel="error that is left, %", ylim=(0, 104), xlim=(1, 384))
    axes.set_xticks([1, 2, 8, 32, 128, 384], ["1", "2", "8", "32", "128", "384"])
    axes.legend(loc="lower left")
    return figure


@functools.cache
def _layer() -> tuple[Tensor, Tensor]:
    """W (384, 384) of a query layer of MiniLM, and its inputs (n, 384) for 32 articles."""
    model, tokenizer = load_base("minilm", num_labels=5)
    layer = model.get_submodule("roberta.encoder.layer.3.attention.self.query")
    assert isinstance(layer, nn.Linear)
    texts = load_news("bbc", validation_fraction=0.1, seed=0).train["text"][:32]
    batch: Any = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")  # type: ignore[misc]
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()(**batch)
    hook.remove()
    return layer.weight.detach(), inputs[0][batch["attention_mask"].bool()]


def _left_by_training(weight: Tensor, x: Tensor, r: int) -> float:
    """The error of the outputs after LoRA on the NF4 weight was trained to give those of `weight`, 0 to 1."""
    model = nn.ModuleDict({"query": nn.Linear(384, 384, bias=False)})
    model["query"].weight = nn.Parameter(weight.clone())
    quantise(model, "nf4")
    inject(model, LoraConfig(r=r, lora_alpha=r, target_modules=("query",), modules_to_save=()))
    target = x @ weight.T
    before = float((model["query"](x) - target).norm())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        (model["query"](x) - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    return float((model["query"](x) - target).norm()) / before


FIGURES: dict[str, Callable[[], Any]] = {
    draw.__name__: draw
    for draw in (
        low_rank, parameters, first_steps, forward, backward, counts, rounding, drift, rank, nf4_levels,
        nf4_error, nf4_rank,
    )
}  # fmt: skip


def _ulps(error: Tensor, exact: Tensor) -> Any:
    """Errors in units of the distance between neighbouring bfloat16 numbers, which have 8 bits."""
    exponent = exact.abs().log2().floor()
    return (error / 2.0 ** (exponent - 7)).flatten().numpy()


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    """Axes without ticks for a drawing in the units 0 to width and 0 to height."""
    figure, axes = plt.subplots(figsize=(4.8, 4.8 * height / width))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Any, x: float, y: float, width: float, text: str, color: str, note: str = "") -> None:
    shape = FancyBboxPatch(
        (x, y), width, 1.05, boxstyle="round,pad=0.02,rounding_size=0.15", color=color, alpha=0.9
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + 0.5, text, ha="center", va="center", color="white", fontsize=12)
    axes.text(x + width / 2, y - 0.15, note, ha="center", va="top", fontsize=10)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "lw": 1.5, "color": "#333333"})


if __name__ == "__main__":
    main()
