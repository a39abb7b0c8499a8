"""`check` finds adapters without effect; `check_layer` accepts correct classes and names each mistake."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_adapter, tiny_roberta
from test_variant import GatedLoRALinear
from torch import nn

from lora import LoraConfig, LoRALinear, MergeableLinear, check, check_layer, inject
from lora.check import Report
from lora.fast.layers import FastLoRALinear
from lora.variants import VARIANTS
from lora.variants.eva import EVALinear


class Base(MergeableLinear):
    """LoRA written from the protocol alone; the wrong classes below change one thing each."""

    adapter_tensors = trained_tensors = ("lora_A", "lora_B")

    def __init__(self, linear, r, lora_alpha, lora_dropout=0.0, use_rslora=False, generator=None):
        super().__init__(linear)
        self.p, self.r = lora_dropout, r
        self.s = lora_alpha / (r**0.5 if use_rslora else r)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype).normal_(generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype))

    def dropped(self, x):
        return F.dropout(x.to(self.lora_A.dtype), self.p, self.training)

    def update(self, x):
        return self.s * self.dropped(x) @ self.lora_A.T @ self.lora_B.T

    def forward(self, x):
        h = super().forward(x)
        return h if self.merged or not self.enabled else (h + self.update(x)).to(h.dtype)

    @torch.no_grad()
    def merged_weight(self):
        return self.base_weight.double() + self.s * self.lora_B.double() @ self.lora_A.double()


class WithSubmodules(LoRALinear):
    """PEFT's structure: A is an nn.Linear."""

    adapter_tensors = trained_tensors = ("down.weight", "lora_B")

    def __init__(self, linear, **settings):
        super().__init__(linear, **settings)
        self.down = nn.Linear(self.in_features, self.r, bias=False, dtype=self.lora_A.dtype)
        self.down.weight.data.copy_(self.lora_A)
        del self.lora_A

    def forward(self, x):
        h = MergeableLinear.forward(self, x)
        if self.merged or not self.enabled:
            return h
        x = F.dropout(x.to(self.lora_B.dtype), self.lora_dropout, self.training)
        return (h + self.scaling * F.linear(self.down(x), self.lora_B)).to(h.dtype)

    def delta_weight(self):
        return self.scaling * (self.lora_B.double() @ self.down.weight.detach().double())


VARIANT_CLASSES = [layer for _, _, layer in VARIANTS if layer is not EVALinear]  # EVA's layers are LoRALinear


@pytest.mark.parametrize(
    "layer",
    [LoRALinear, FastLoRALinear, Base, WithSubmodules, GatedLoRALinear, *VARIANT_CLASSES],
    ids=lambda c: c.__name__,
)
def test_correct_classes_are_accepted(layer):
    report = check_layer(layer)
    assert report, "\n".join(report.problems)
    assert len(report.lines) > 50


class BothZero(Base):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.zeros_(self.lora_A)


class NeitherZero(Base):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.ones_(self.lora_B)


class IgnoresGenerator(Base):
    def __init__(self, *args, generator=None, **kwargs):
        super().__init__(*args, **kwargs)
        torch.seed()
        nn.init.normal_(self.lora_A)


class AlphaWithoutRank(Base):
    def __init__(self, linear, r, lora_alpha, **rest):
        super().__init__(linear, r=r, lora_alpha=lora_alpha, **rest)
        self.s = lora_alpha


class ScaledTwice(Base):
    def update(self, x):
        return self.s * super().update(x)


class TrainsW(Base):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight.requires_grad_(True)


class Sixteen(Base):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.to(self.weight.dtype)


class DropsEverything(Base):
    def forward(self, x):
        return super().forward(F.dropout(x, self.p, self.training and not self.merged))

    def dropped(self, x):
        return x.to(self.lora_A.dtype)


class DropsTwice(Base):
    def dropped(self, x):
        return F.dropout(super().dropped(x), self.p, self.training)


class DropsInEval(Base):
    def dropped(self, x):
        return F.dropout(x.to(self.lora_A.dtype), self.p, True)


class _Redrawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx, grad):
        return F.dropout(grad, ctx.p), None


class RedrawsMask(Base):
    def dropped(self, x):
        x = x.to(self.lora_A.dtype)
        return _Redrawn.apply(x, self.p) if self.training and self.p else x


class KeepsUnscaled(Base):
    def dropped(self, x):
        return super().dropped(x) * (1 - self.p if self.training else 1)


class MergesDropout(Base):
    def merged_weight(self):
        with torch.no_grad():
            A = F.dropout(self.lora_A.double(), self.p, self.training)
            return self.base_weight.double() + self.s * self.lora_B.double() @ A


class MergesWhatIsMerged(Base):
    def merged_weight(self):
        return self.weight.double() + self.s * self.lora_B.double() @ self.lora_A.double()


class MergesInFloat32(Base):
    def merged_weight(self):
        return super().merged_weight().float()


class MergesOtherSign(Base):
    def merged_weight(self):
        return 2 * self.base_weight.double() - super().merged_weight()


class SubtractsToUnmerge(Base):
    def unmerge(self):
        delta = (self.merged_weight() - self.base_weight.double()).to(self.weight.dtype)
        super_weight = self.weight - delta
        super().unmerge()
        self.weight.data.copy_(super_weight)


class MergesInEval(Base):
    def train(self, mode=True):
        super().train(mode)
        if not mode and not self.merged:
            self.merge()
        return self


class ForgetsFactor(Base):
    adapter_tensors = trained_tensors = ("lora_B",)


class _NoGradientOfA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A):
        ctx.save_for_backward(x, A)
        return x @ A.T

    @staticmethod
    def backward(ctx, grad):
        x, A = ctx.saved_tensors
        return grad @ A, 2 * grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


class WrongBackward(Base):
    def update(self, x):
        return self.s * _NoGradientOfA.apply(self.dropped(x), self.lora_A) @ self.lora_B.T


class ChangesInput(Base):
    def forward(self, x):
        h = super().forward(x)
        with torch.no_grad():
            x.mul_(1.01)
        return h


class TransposedA(Base):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A = nn.Parameter(self.lora_A.detach().T.contiguous())


class IgnoresSwitch(Base):
    def forward(self, x):
        self.enabled = True
        return super().forward(x)


WRONG = {
    BothZero: "at the start some trained tensor has a gradient",
    NeitherZero: "a fresh adapter changes no bit",
    IgnoresGenerator: "the same generator gives the same adapter",
    AlphaWithoutRank: "ΔW = 6·B·A, and lora_alpha / r is 2",
    ScaledTwice: r"forward computes merged_weight\(\)",
    TrainsW: "W and b are frozen",
    Sixteen: "the adapter of a bfloat16 weight is float32",
    DropsEverything: "a fresh adapter changes no bit, torch.float32, train mode",
    DropsTwice: "the share of kept elements",
    DropsInEval: "there is no dropout in eval mode",
    RedrawsMask: "backward uses the mask of forward",
    KeepsUnscaled: "dropout keeps the mean",
    MergesDropout: r"merged_weight\(\) is the same twice",
    MergesWhatIsMerged: r"merged_weight\(\) is the same while merged",
    MergesInFloat32: r"merged_weight\(\) is float64: torch.float32",
    MergesOtherSign: r"forward computes merged_weight\(\)",
    SubtractsToUnmerge: "unmerge restores W bit for bit",
    MergesInEval: r"eval\(\) does not merge",
    ForgetsFactor: "but not lora_A",
    WrongBackward: "the gradient of lora_A equals finite differences",
    ChangesInput: "forward leaves x unchanged",
    TransposedA: "shape|mat1",
    IgnoresSwitch: r"a disabled adapter gives W·x \+ b",
    nn.Linear: "subclass of lora.mergeable.MergeableLinear",
}


@pytest.mark.parametrize("layer", WRONG, ids=lambda layer: layer.__name__)
def test_a_wrong_class_is_rejected_for_its_mistake(layer):
    report = check_layer(layer)
    assert any(re.search(WRONG[layer], text) for text in report.problems), report.problems


def test_a_model_that_uses_its_adapter_passes(model, config, input_ids):
    inject(model, config)
    randomise_adapter(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    report = check(model, {"input_ids": input_ids})
    assert report, str(report)
    assert check(model, input_ids)
    assert check(model, (input_ids,))
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_infinities_a_buffer_and_a_patch_stay_as_they_were():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            h = self.proj(x)
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            return h.masked_fill(torch.eye(4, dtype=torch.bool), -math.inf)

    model = Masked()
    inject(model, LoraConfig(r=2, target_modules=("proj",)))
    patch = model.proj.forward = model.proj.forward
    report = check(model, torch.randn(4, 4))
    assert report, str(report)
    assert torch.equal(model.mean, torch.zeros(4))
    assert vars(model.proj)["forward"] is patch


class ReadsWeight(nn.Module):
    """Reads the weight through a local variable, which `inject` does not see."""

    def __init__(self, only_in_eval=False):
        super().__init__()
        self.proj, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.only_in_eval = only_in_eval

    def forward(self, x):
        layer = self.proj
        if self.training and self.only_in_eval:
            return layer(x)
        return F.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("only_in_eval", [False, True])
def test_a_weight_read_directly_and_a_layer_not_called_are_reported(only_in_eval):
    model = ReadsWeight(only_in_eval)
    inject(model, LoraConfig(target_modules=("proj", "unused")))
    randomise_adapter(model)
    report = check(model, torch.randn(2, 8))
    text = str(report)
    assert not report
    assert "eval mode: another module reads proj.weight" in text
    assert ("train mode: another module reads proj.weight" in text) != only_in_eval
    assert "not proj, unused" in text
    assert "FAIL  merged: the model's output differs" in text


def test_a_check_that_fails_leaves_the_model_as_it_was(model, config):
    inject(model, config)
    with pytest.raises((TypeError, IndexError, ValueError)):
        check(model, {"input_ids": None, "nonsense": 1})
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(RuntimeError, match="no adapter"):
        check(tiny_roberta(), {})


def test_a_check_leaves_batch_normalisation_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match="1: the running statistics change in train mode"):
        inject(model, LoraConfig(r=2, target_modules=("0",)))
    before = copy.deepcopy(model.state_dict())
    assert check(model, torch.randn(8, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_report_is_false_if_something_failed():
    report = Report()
    report.add(True, "one")
    assert report
    report.add(False, "two")
    assert not report
    assert str(report) == "ok    one\nFAIL  two"
