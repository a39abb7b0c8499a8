"""What the checks share: comparisons with an oracle whose messages name known mistakes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CheckError(Exception):
    """The reader's code is wrong. The message says what was expected, what it returned, and why if known."""

    def __init__(self, what: str, expected: str, got: str = "", why: str = ""):
        lines = [what, f"expected  {expected}", f"got       {got}" if got else "", *why.splitlines()]
        super().__init__("\n".join(line for line in lines if line))


def expect(
    what: str,
    got: object,
    expected: Tensor,
    mistakes: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-9,
) -> None:
    """Raises CheckError unless `got` is a tensor with the shape and values of `expected`.

    mistakes: what known mistakes result in, by a sentence that explains the mistake. tolerance: the largest
    difference allowed, relative to the largest value of `expected`; 0 compares bits. The default is for
    float64: roundings are near 1e-15, and the mistakes that the checks know change more than 1e-6.
    """
    if not isinstance(got, Tensor):
        raise CheckError(what, describe(expected), describe(got), _no_tensor(got))
    if _equal(got, expected, tolerance):
        return
    why = next(
        (why for why, wrong in (mistakes or {}).items() if _equal(got, wrong, max(tolerance, 1e-9))), ""
    )
    if got.shape == expected.shape:
        difference = (got.detach().double() - expected.detach().double()).abs()
        at = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
        most = f"largest difference {float(difference.max()):.3g}, at {at}"
        why = f"{most}\n{why}".strip()
    raise CheckError(what, describe(expected), describe(got), why)


def expect_value(
    what: str, got: object, expected: object, mistakes: Mapping[str, object] | None = None
) -> None:
    """Raises CheckError unless `got` equals `expected`. mistakes: as for `expect`."""
    if type(got) is type(expected) and got == expected:
        return
    if isinstance(got, int | float) and not isinstance(got, bool) and got == expected:
        return
    why = next((why for why, wrong in (mistakes or {}).items() if got == wrong), "")
    raise CheckError(what, describe(expected), describe(got), why)


def expect_error(what: str, kind: type[Exception], action: Any, *arguments: Any, why: str = "") -> Exception:
    """Calls `action` and returns the exception it raises. Raises CheckError if it raises no `kind`."""
    try:
        action(*arguments)
    except kind as error:
        return error
    raise CheckError(what, f"a {kind.__name__} is raised", "no error", why)


def some(names: Collection[str]) -> str:
    """The first two names, and how many more there are."""
    return ", ".join(sorted(names)[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "") or "none"


def describe(value: object) -> str:
    """A value in a line or two: a tensor by its shape, dtype and first elements."""
    if not isinstance(value, Tensor):
        text = repr(value)
        return text if len(text) <= 300 else f"{text[:300]}…"
    head = f"tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if not value.numel():
        return head
    first = ", ".join(f"{x:.5g}" for x in value.detach().flatten()[:6].double().tolist())
    return f"{head}: {first}{', …' if value.numel() > 6 else ''}"


class NewTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that collects the shapes of all tensors that are computed inside, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and notes the shapes of its results."""
        before = {_address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.shapes += [
            tuple(each.shape)
            for each in tree_leaves(result)
            if isinstance(each, Tensor) and _address(each) not in before
        ]
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _equal(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if got.shape != expected.shape:
        return False
    if tolerance == 0:
        return got.dtype == expected.dtype and torch.equal(got, expected)
    if not got.numel():
        return True
    scale = max(float(expected.detach().double().abs().max()), 1e-300)
    return bool((got.detach().double() - expected.detach().double()).abs().max() <= tolerance * scale)


def _no_tensor(got: object) -> str:
    return "Did you forget `return`?" if got is None else ""
