"""Draws lora/variants/ideas.png: one panel for the idea of each variant, from small regressions.

A layer of 64 x 64 is trained to imitate another one whose rows have other lengths and whose weight has an
additional part of rank 4. The panels show what the methods do, not which is better.

    python -m bench.variant_ideas
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import plotting
from lora import LoraConfig, LoRALinear, inject
from lora.adapted import product_layers
from lora.anatomy import svd
from lora.inject import derived_seed
from lora.variants.eva import distribute, input_directions
from lora.variants.lora_plus import parameter_groups

PICTURE = Path(__file__).parent.parent / "lora" / "variants" / "ideas.png"
WIDTH, RANK, STEPS, RATE = 64, 4, 300, 3e-3


def main() -> int:
    """Trains the layers and draws the picture. Returns the exit status."""
    generator = torch.Generator().manual_seed(derived_seed("variant ideas"))
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    base = nn.ModuleDict({"layer": linear})
    U, V = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] for _ in range(2))
    W = (U * torch.logspace(0.5, -1, WIDTH)) @ V.T
    lengths = 0.7 + 0.6 * torch.rand(WIDTH, generator=generator)
    thin = [torch.randn(WIDTH, RANK, generator=generator) / WIDTH**0.5 for _ in range(2)]
    with torch.no_grad():
        linear.weight.copy_(W)
    target = lengths[:, None] * (W + thin[0] @ thin[1].T)

    def trained(ratio: float = 1.0, **settings: Any) -> tuple[LoRALinear, LoRALinear, list[Tensor]]:
        """The fresh layer, the trained one, and ‖A - A₀‖ and ‖B - B₀‖ after each step, (2,)."""
        model = copy.deepcopy(base)
        inject(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=("layer",), **settings))
        layer = product_layers(model)["layer"]
        fresh = copy.deepcopy(layer)
        parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam(parameter_groups(parameters, RATE, loraplus_lr_ratio=ratio))
        noise = torch.Generator().manual_seed(0)
        moved = []
        for _ in range(STEPS):
            x = torch.randn(128, WIDTH, generator=noise)
            (layer(x) - x @ target.T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            pairs = ((layer.lora_A, fresh.lora_A), (layer.lora_B, fresh.lora_B))
            moved.append(torch.stack([(now - then).detach().norm() for now, then in pairs]))
        return fresh, layer, moved

    figure, axes = plotting.panels(2, 3, 4.2, 3)
    (spectrum, updates, rows), (frozen, rates, ranks) = axes
    _, lora, moved = trained()
    S = svd(W).S
    numbers = range(1, WIDTH + 1)
    spectrum.semilogy(numbers, S, ".", color=plotting.GREY, ms=4)
    spectrum.semilogy(numbers[:RANK], S[:RANK], "o", color=plotting.ORANGE, ms=5)
    spectrum.semilogy(numbers[-RANK:], S[-RANK:], "s", color=plotting.GREEN, ms=5)
    spectrum.set(title="PiSSA and MiLoRA: the start", xlabel="singular value of W")
    starts = {"LoRA": True, "PiSSA": "pissa", "MiLoRA": "milora"}
    colors = (plotting.BLUE, plotting.ORANGE, plotting.GREEN)
    for (name, start), color in zip(starts.items(), colors, strict=True):
        values = svd(trained(init_lora_weights=start)[1].delta_weight()).S[: 2 * RANK + 2]
        updates.plot(range(1, len(values) + 1), values, ".-", color=color, label=name)
    updates.set(title="and the update that they learn", xlabel="singular value of ΔW")

    dora = trained(use_dora=True)[1]
    length = W.norm(dim=1)
    order = lengths.argsort()
    rows.plot(lengths[order], color=plotting.GREY, label="target")
    learned = {"LoRA": lora.merged_weight(), "DoRA": dora.merged_weight()}
    for (name, weight), color in zip(learned.items(), (plotting.BLUE, plotting.RED), strict=True):
        rows.plot((weight.norm(dim=1) / length)[order], ".", ms=4, color=color, label=name)
    rows.set(title="DoRA: length of each row / that of W", xlabel="row")

    steps = range(1, STEPS + 1)
    for name, path, color in (("LoRA", moved, plotting.BLUE), ("LoRA-FA", None, plotting.RED)):
        path = path or trained(use_lora_fa=True)[2]
        frozen.plot(steps, [float(A) for A, _ in path], "--", color=color)
        frozen.plot(steps, [float(B) for _, B in path], color=color, label=name)
    frozen.set(title="LoRA-FA: change of A (dashed) and B", xlabel="step")
    for name, path, color in (("LoRA", moved, plotting.BLUE), ("LoRA+", trained(16)[2], plotting.GREEN)):
        rates.semilogy(steps, [float(A) for A, _ in path], "--", color=color)
        rates.semilogy(steps, [float(B) for _, B in path], color=color, label=name)
    rates.set(title="LoRA+: change of A (dashed) and B", xlabel="step")

    # Layers whose inputs lie in few directions, and in many
    layers = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("few", "some", "many")})
    decays = dict(zip(layers, (1.5, 0.7, 0.3), strict=True))
    shares = {}
    for name, decay in decays.items():
        x = torch.randn(2000, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1) ** -decay
        shares[name] = input_directions(layers[name], {name: layers[name]}, [{"input": x}])[name][0]
    found = distribute(shares, dict.fromkeys(shares, 8))
    for name, color in zip(shares, colors, strict=True):
        ranks.semilogy(range(1, 17), shares[name][:16], ".", ms=3, color=color)
        kept = found[name]
        ranks.semilogy(range(1, kept + 1), shares[name][:kept], "-", color=color)
        ranks.text(kept, 0.8 * float(shares[name][kept - 1]), f"rank {kept}", color=color, va="top")
    ranks.set(title="EVA: share of the inputs explained", xlabel="direction, in three layers")
    plotting.save(figure, PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
