"""Tests a layer class against the promises that `inject`, merging, files and training rely on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.check import Report
from lora.errors import first_line
from lora.mergeable import MergeableLinear
from lora.rounding import round_to

_IN, _OUT, _R, _ALPHA, _P = 12, 10, 3, 6.0, 0.4


def check_layer(layer: type[MergeableLinear]) -> Report:
    """Tests a class that adapts an nn.Linear, on small random layers, and reports each property with numbers.

    The class must be a subclass of MergeableLinear, constructed as `layer(linear, r=, lora_alpha=,
    lora_dropout=, use_rslora=, generator=)`. It is expected to compute a function that is linear in x for
    a given dropout mask, with the gradients of what it computes. A class whose gradients leave something
    out on purpose, such as a norm, says so in `detached = "reason"`; its gradients are then not tested.

    Nothing is raised: an exception in the class is a line of the report.
    """
    report = Report()
    if not (isinstance(layer, type) and issubclass(layer, MergeableLinear)):
        report.add(False, "the class is a subclass of lora.mergeable.MergeableLinear")
        return report
    for test in _TESTS:
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                for ok, text in test(layer):
                    report.add(bool(ok), text)
        except Exception as error:
            where = (test.__doc__ or "").strip().rstrip(".").lower()
            report.add(False, f"{where}: {type(error).__name__}: {first_line(error)}")
            if test is _is_constructed:
                break
    return report


Results = Iterator[tuple[Any, str]]


def _make(
    layer: type[MergeableLinear],
    dtype: torch.dtype = torch.float32,
    p: float = 0.0,
    train: bool = False,
    random: bool = True,
    **settings: Any,
) -> MergeableLinear:
    """A layer on a random nn.Linear. random: gives every trained tensor a random value added to its own."""
    torch.manual_seed(7)
    linear = nn.Linear(_IN, _OUT, dtype=dtype).train(train)
    make: Any = layer
    settings = {"r": _R, "lora_alpha": _ALPHA, "use_rslora": False, **settings}
    made: MergeableLinear = make(
        linear, lora_dropout=p, generator=torch.Generator().manual_seed(0), **settings
    )
    state = made.adapter_state()
    torch.manual_seed(11)
    with torch.no_grad():
        for name in made.trained_tensors if random else ():
            state[name].add_(0.3 * torch.randn_like(state[name]))
    return made


def _input(rows: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, _IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def _is_constructed(layer: type[MergeableLinear]) -> Results:
    """Construction."""
    made = _make(layer, random=False)
    kept = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    unknown = [name for name in made.adapter_tensors if name not in kept]
    yield not unknown, f"adapter_tensors are parameters or buffers of the layer{_but(unknown)}"
    yield (
        bool(made.trained_tensors),
        f"trained_tensors has names: {', '.join(made.trained_tensors) or 'none'}",
    )
    other = [name for name in made.trained_tensors if name not in made.adapter_tensors]
    yield not other, f"trained_tensors are among adapter_tensors{_but(other)}"
    forgotten = sorted(made.state_dict().keys() - {"weight", "bias", *made.adapter_tensors})
    yield (
        not forgotten,
        f"every tensor of the adapter is in adapter_tensors, so that it is saved{_but(forgotten)}",
    )
    frozen = not made.weight.requires_grad and not (made.bias is not None and made.bias.requires_grad)
    yield frozen, "W and b are frozen"
    still = [name for name in made.trained_tensors if not made.adapter_state()[name].requires_grad]
    yield not still, f"trained_tensors require gradients{_but(still)}"
    coarse = [
        name for name, tensor in _make(layer, torch.bfloat16).adapter_state().items() if _is_16_bit(tensor)
    ]
    yield not coarse, f"the adapter of a bfloat16 weight is float32{_but(coarse)}"


def _starts_as_identity(layer: type[MergeableLinear]) -> Results:
    """A fresh adapter."""
    for dtype in (torch.float32, torch.bfloat16):
        for mode in ("eval", "train"):
            made = _make(layer, dtype, p=_P, train=mode == "train", random=False)
            x = _input(dtype=dtype)
            difference = _largest(made(x) - F.linear(x, made.weight, made.bias))
            yield difference == 0, f"a fresh adapter changes no bit, {dtype}, {mode} mode: {difference:.1e}"
    first, again = _make(layer, random=False).adapter_state(), _make(layer, random=False).adapter_state()
    yield (
        all(torch.equal(first[key], again[key]) for key in first),
        "the same generator gives the same adapter",
    )
    made = _make(layer, random=False)
    made.train()(_input()).square().sum().backward()
    sizes = {name: _gradient_size(made, name) for name in made.trained_tensors}
    shown = ", ".join(f"{name} {size:.1e}" for name, size in sizes.items())
    yield any(sizes.values()), f"at the start some trained tensor has a gradient, so that it learns: {shown}"


def _learns(layer: type[MergeableLinear]) -> Results:
    """Training."""
    made = _make(layer)
    before = made.weight.detach().clone()
    x = _input()
    made.train()(x).square().sum().backward()
    for name in made.trained_tensors:
        yield _gradient_size(made, name) > 0, f"{name} has a gradient: {_gradient_size(made, name):.1e}"
    yield made.weight.grad is None, "W has no gradient"
    yield torch.equal(made.weight, before), "forward and backward leave W unchanged"
    yield torch.equal(x, _input()), "forward leaves x unchanged"
    with torch.no_grad():
        nested = made.eval()(x[None, :, None])
        flat = made(x)
    shape = (1, len(x), 1, _OUT)
    yield nested.shape == shape, f"x may have any leading dimensions: {tuple(nested.shape)} for {shape}"
    if nested.shape == shape:
        yield _largest(nested.view(-1, _OUT) - flat) < 1e-5, "leading dimensions do not change the output"
    half = _make(layer, torch.bfloat16)
    found = half(_input(dtype=torch.bfloat16)).dtype
    yield found == torch.bfloat16, f"the output of a bfloat16 layer is bfloat16: {found}"


def _has_right_gradients(layer: type[MergeableLinear]) -> Results:
    """Gradients against finite differences in float64."""
    made = _make(layer, torch.float64)
    x = _input(dtype=torch.float64).requires_grad_()
    g = torch.randn(len(x), _OUT, dtype=torch.float64)
    (made(x) * g).sum().backward()
    assert x.grad is not None
    found = _relative(x.grad, g @ made.merged_weight())
    yield found < 1e-9, f"the gradient of x is that of the merged weight: relative difference {found:.1e}"
    reason = getattr(made, "detached", "")
    for name in made.trained_tensors:
        tensor = made.adapter_state()[name]
        expected = torch.zeros_like(tensor)
        with torch.no_grad():
            for at in range(tensor.numel()):
                step = torch.zeros(tensor.numel(), dtype=tensor.dtype)
                step[at] = 1e-5
                sides = []
                for sign in (1, -1):
                    tensor.add_(sign * step.view_as(tensor))
                    sides.append(float((made(x) * g).sum()))
                    tensor.sub_(sign * step.view_as(tensor))
                expected.view(-1)[at] = (sides[0] - sides[1]) / 2e-5
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        found = _relative(grad, expected)
        if reason:
            yield True, f"the gradient of {name} differs by {found:.1e}, on purpose: {reason}"
        else:
            yield found < 1e-6, f"the gradient of {name} equals finite differences: relative {found:.1e}"


def _drops_once(layer: type[MergeableLinear]) -> Results:
    """Dropout."""
    made = _make(layer, torch.float64, p=_P, train=True)
    with torch.no_grad():
        weight, update = made.base_weight.double(), made.merged_weight() - made.base_weight.double()
        merged_weight = weight + update
    x = _input(400, torch.float64).requires_grad_()  # each row has a mask of its own
    h = made(x)
    rows = [torch.autograd.grad(h[:, k].sum(), x, retain_graph=True)[0] for k in range(_OUT)]
    stacked = torch.stack(rows, dim=1)  # (rows, out, in): for each row the matrix that it was multiplied by
    bias = 0 if made.bias is None else made.bias
    found = _relative(h.detach() - bias, (stacked @ x.detach()[..., None])[..., 0])
    yield found < 1e-9, f"backward uses the mask of forward: the output equals J·x to {found:.1e}"
    yield bool((stacked != stacked[:1]).any()), "each row has a mask of its own"
    yield not torch.equal(made(x), h), "the mask differs from forward to forward in training"
    # Means of 400 draws of a value with a standard deviation of |ΔW|·√(p / (1 - p)), within 6 of their own.
    tolerance = 6 * math.sqrt(_P / (1 - _P) / len(stacked)) * float(update.abs().max())
    found = _largest(stacked.mean(0) - merged_weight)
    yield (
        found <= tolerance,
        f"dropout keeps the mean of W + ΔW: off by {found:.1e} (at most {tolerance:.1e})",
    )
    columns = stacked[:, 0].round(decimals=9).T.tolist()
    factors = max(len(set(column)) for column in columns)
    yield factors <= 2, f"one mask keeps or drops an element of x: {factors} different factors"
    kept = (stacked[:, 0, :] - stacked[:, 0, :].amin(0)).abs() > 1e-9
    share = float(torch.where(update[0] > 0, kept, ~kept).double().mean())
    spread = 6 * math.sqrt(_P * (1 - _P) / kept.numel())
    yield abs(share - (1 - _P)) < spread, f"the share of kept elements is 1 - lora_dropout: {share:.3f}"
    made.eval()
    yield torch.equal(made(x), made(x)), "there is no dropout in eval mode"


def _is_scaled(layer: type[MergeableLinear]) -> Results:
    """Scaling."""
    for rslora in (False, True):
        made = _make(layer, torch.float64, use_rslora=rslora)
        state = made.adapter_state()
        A, B = (state.get(key, state.get(f"{key}.weight")) for key in ("lora_A", "lora_B"))
        if A is None or B is None or A.shape != (_R, _IN) or B.shape != (_OUT, _R):
            return  # not a product of two factors
        with torch.no_grad():
            product, update = B @ A, made.merged_weight() - made.base_weight
            factor = float((product * update).sum() / product.square().sum())
            if _relative(factor * product, update) > 1e-6:
                return  # another variant's ΔW
        expected = _ALPHA / (math.sqrt(_R) if rslora else _R)
        name = "lora_alpha / √r with use_rslora" if rslora else "lora_alpha / r"
        yield abs(factor / expected - 1) < 1e-9, f"ΔW = {factor:.4g}·B·A, and {name} is {expected:.4g}"


def _merges_what_it_computes(layer: type[MergeableLinear]) -> Results:
    """Merging."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        made = _make(layer, dtype)
        x, before = _input(dtype=dtype), made.weight.detach().clone()
        with torch.no_grad():
            exact = made.merged_weight()
            yield exact.dtype == torch.float64, f"merged_weight() is float64: {exact.dtype}"
            yield exact.shape == (_OUT, _IN), f"merged_weight() is (out, in): {tuple(exact.shape)}"
            separate = made(x).double()
            expected = F.linear(x.double(), exact, None if made.bias is None else made.bias.double())
            # Independent roundings of in + r products add up as the root of their number.
            limit = 8 * math.sqrt(_IN + _R) * torch.finfo(dtype).eps
            found = _largest(separate - expected) / _largest(expected)
            text = (
                f"{dtype}: forward computes merged_weight()·x + b: relative {found:.1e} (at most {limit:.1e})"
            )
            yield found <= limit, text
            made.merge()
            wrong = int((made.weight != round_to(exact, dtype)).sum())
            yield wrong == 0, f"{dtype}: merge rounds merged_weight() once: {wrong} of {exact.numel()} differ"
            same = torch.equal(made.merged_weight(), exact)
            yield same, f"{dtype}: merged_weight() is the same while merged: from base_weight, not weight"
            found = _largest(made(x).double() - expected) / _largest(expected)
            yield (
                found <= limit,
                f"{dtype}: merged forward computes it too: {found:.1e} (at most {limit:.1e})",
            )
            kept = made.state_dict()["weight"]
            yield torch.equal(kept, before), f"{dtype}: the state dict of a merged layer has W"
            for _ in range(3):
                made.unmerge()
                made.merge()
            made.unmerge()
        changed = int((made.weight != before).sum())
        yield changed == 0, f"{dtype}: unmerge restores W bit for bit: {changed} of {before.numel()} differ"


def _keeps_states_apart(layer: type[MergeableLinear]) -> Results:
    """States."""
    made = _make(layer, p=_P, train=True)
    before = made.weight.detach().clone()
    with torch.no_grad():
        exact = made.merged_weight()
        yield torch.equal(exact, made.merged_weight()), "merged_weight() is the same twice, without dropout"
        yield torch.equal(made.weight, before), "merged_weight() leaves W unchanged"
    made.eval()
    yield torch.equal(made.weight, before) and not made.merged, "eval() does not merge"
    made.train()
    yield torch.equal(made.weight, before) and not made.merged, "train() does not merge"
    made.eval()
    made.merge()
    yield made.merged, "merge() sets merged"
    try:
        made.merge()
        yield False, "merging twice is an error"
    except RuntimeError:
        yield True, "merging twice is an error"
    if made.merged:
        made.unmerge()
    yield not made.merged, "unmerge() clears merged"
    x = _input()
    made.enabled = False
    found = _largest(made(x) - F.linear(x, made.weight, made.bias))
    yield found == 0, f"a disabled adapter gives W·x + b: {found:.1e}"
    made.enabled = True
    other = copy.deepcopy(made)
    yield torch.equal(other(x), made(x)), "a deep copy computes the same"
    with torch.no_grad():
        for name in made.trained_tensors:
            made.merge()
            tensor = made.adapter_state()[name]
            tensor.add_(0.1)
            try:
                made(x)
                yield False, f"a change of {name} while merged is noticed"
            except RuntimeError:
                yield True, f"a change of {name} while merged is noticed"
            tensor.sub_(0.1)
            made.unmerge()


_TESTS = (
    _is_constructed,
    _starts_as_identity,
    _learns,
    _has_right_gradients,
    _drops_once,
    _is_scaled,
    _merges_what_it_computes,
    _keeps_states_apart,
)


def _but(names: list[str]) -> str:
    return f", but not {', '.join(names)}" if names else ""


def _is_16_bit(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _gradient_size(layer: MergeableLinear, name: str) -> float:
    grad = layer.adapter_state()[name].grad
    return 0.0 if grad is None else float(grad.norm())


def _largest(x: Tensor) -> float:
    return float(x.detach().double().abs().max())


def _relative(x: Tensor, y: Tensor) -> float:
    return _largest(x - y) / max(_largest(y), 1e-30)
