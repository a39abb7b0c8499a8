"""The checks of step 6."""

from types import ModuleType
from typing import Any

import torch
from torch import nn

from learn.checks.models import HEAD, minilm_shapes
from learn.course import folder_of, load
from learn.oracle import CheckError, expect, expect_error, expect_value
from lora import LoraConfig
from lora.inject import find_targets
from model import load_base

NAMES = (
    ("encoder.layer.0.attention.self.query", "query", True),
    ("encoder.layer.0.attention.self.query", "attention.self.query", True),
    ("query", "query", True),
    ("encoder.layer.0.subquery", "query", False),
    ("encoder.layer.0.query.dropout", "query", False),
    ("encoder.layer.10.query", "layer.0.query", False),
    ("encoder.layer.10.query", "0.query", False),
)


def check_ends_with(step: ModuleType) -> None:
    """ends_with compares whole components from the end: "query" matches "self.query", never "subquery"."""
    for name, pattern, wanted in NAMES:
        got = step.ends_with(name, pattern)
        mistakes: dict[str, object] = {}
        if got and pattern in name and not name.endswith(pattern):
            mistakes["The pattern is somewhere inside the name; it has to be at the end."] = True
        elif got and name.endswith(pattern):
            mistakes["The pattern is a part of a component. Only whole components count: mind the dot."] = (
                True
            )
        elif name == pattern:
            mistakes["A name may be the pattern itself, without a dot before it."] = False
        expect_value(f"ends_with({name!r}, {pattern!r})", got, wanted, mistakes)


def check_names(step: ModuleType) -> None:
    """On MiniLM, inject replaces the layers that the library's injector finds, and returns their names."""
    for patterns in (
        ("query", "value"),
        ("attention.self.key",),
        ("query", "dense"),
        ("query", "attention.self.query"),
        ("0.attention.self.query",),
    ):
        model = minilm_shapes()
        model.classifier_norm = nn.ModuleDict({"dense": nn.Linear(4, 4)})  # beside the head, not inside it
        config = LoraConfig(target_modules=patterns, modules_to_save=(HEAD,))
        wanted = {name for names in find_targets(model, config).adapted.values() for name in names}
        got = step.inject(model, patterns, _Wrapped, HEAD)
        replaced = {name for name, module in model.named_modules() if isinstance(module, _Wrapped)}
        what = f"inject(model, {patterns}, make_layer, {HEAD!r})"
        extra, missing = sorted(replaced - wanted), sorted(wanted - replaced)
        if extra or missing:
            why = ""
            if extra and all(name.startswith(f"{HEAD}.") for name in extra):
                why = "Layers inside the head are adapted. The head is trained in full: leave it alone."
            if missing and len(missing) == len(wanted):
                why = "Nothing is replaced where it is: set the attribute of its parent module."
            raise CheckError(
                what,
                expected=f"{len(wanted)} layers replaced",
                got=f"{len(replaced)}; not replaced: {missing[:2]}, replaced too: {extra[:2]}",
                why=why,
            )
        order = [name for name, _ in model.named_modules() if name in wanted]
        if isinstance(got, list) and got != order and sorted(got) == sorted(order):
            raise CheckError(
                f"the names that {what} returns",
                expected=f"the order of named_modules(): {order[:2]}, …",
                got=f"the same names in another order: {got[:2]}, …",
                why="Walk the tree once, and compare each name with all patterns, not once per pattern.",
            )
        expect_value(f"the names that {what} returns", got, order)


def check_same_parameters(step: ModuleType) -> None:
    """With your layer of step 3, each layer holds the old W itself, and MiniLM's outputs are the same."""
    model, _ = load_base("minilm")
    ids = torch.arange(1000, 1024).reshape(2, 12)
    with torch.no_grad():
        before = model(ids).logits
    weights = {
        name: parameter for name, parameter in model.named_parameters() if name.endswith("query.weight")
    }
    layer = load(folder_of(step), 3).MyLoRALinear
    step.inject(model, ("query", "value"), lambda linear: layer(linear, r=8, lora_alpha=16), HEAD)
    for name, weight in weights.items():
        if model.get_submodule(name.removesuffix(".weight")).weight is not weight:
            raise CheckError(name, expected="the Parameter of the old layer", got="another one, a copy")
    with torch.no_grad():
        expect("the logits of MiniLM with a fresh adapter", model(ids).logits, before, tolerance=0)


def check_no_match(step: ModuleType) -> None:
    """A pattern that matches no Linear is an error that names it, and leaves the model unchanged."""
    for patterns in (("query", "q_proj"), ("LayerNorm",), ("query", "out_proj"), ("query", HEAD)):
        model = minilm_shapes()
        if patterns[-1] == HEAD:
            model.classifier = nn.Linear(4, 4)  # a head may be a Linear itself
        why = "A misspelt pattern would train nothing, or less than you think, and no message would say so."
        what = f"inject(model, {patterns}, …), where {patterns[-1]!r} matches no nn.Linear outside the head"
        arguments: tuple[Any, ...] = (model, patterns, _Wrapped, HEAD)
        error = expect_error(what, ValueError, step.inject, *arguments, why=why)
        if patterns[-1] not in str(error):
            raise CheckError(what, expected=f"a message that names {patterns[-1]!r}", got=f"{str(error)!r}")
        if any(isinstance(module, _Wrapped) for module in model.modules()):
            raise CheckError(
                what,
                expected="an unchanged model",
                got="some layers are replaced already",
                why="Check all patterns before the first replacement.",
            )


class _Wrapped(nn.Module):
    """Stands for an adapted layer."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise CheckError("the argument of make_layer", "an nn.Linear", f"a {type(linear).__name__}")
        self.inner = [linear]  # in a list, so that it is not a part of the module tree


CHECKS = (check_ends_with, check_names, check_same_parameters, check_no_match)
