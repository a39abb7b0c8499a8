"""Exact: merged weights against rational arithmetic, cycles bit for bit, outputs within the error bound.

The oracle for rounding is exact: floats are rationals, and `fractions` adds and multiplies them without
error. The bounds are those of standard floating-point error analysis (Higham, Accuracy and Stability of
Numerical Algorithms, chapter 3), with γ_n = n·u / (1 - n·u) for n operations of unit roundoff u.
"""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import randomise_adapter, tiny_roberta
from torch import nn

from lora import LoRALinear, inject, merge, merged, save_adapter, unmerge
from lora.adapted import lora_layers

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
U64 = Fraction(1, 2**53)


def gamma(n: int, u: Fraction | float) -> Fraction | float:
    return n * u / (1 - n * u)


def make_layer(dtype, kind="plain", r=3, shape=(5, 7), seed=0, **settings) -> LoRALinear:
    """kind: "cancel" makes W the negative of the delta, as near as the dtype holds it; "tiny" and "large"
    reach for the ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    layer = LoRALinear(nn.Linear(shape[1], shape[0]).to(dtype), r=r, lora_alpha=0.7 * r, **settings)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=generator))
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator))
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
        if kind == "cancel":
            layer.weight.copy_(-layer.delta_weight())
        if kind in ("tiny", "large"):
            factor = {"tiny": torch.finfo(dtype).tiny, "large": torch.finfo(dtype).max / 4096}[kind]
            layer.weight.mul_(factor)
            layer.lora_B.mul_(factor)
    return layer


def exact_merge(layer: LoRALinear) -> list[list[tuple[Fraction, Fraction]]]:
    """W + scaling·B·A of each element as a rational, and |W| + |scaling|·|B|·|A|, its condition."""
    scaling = Fraction(layer.scaling)
    W, A, B = (
        [[Fraction(value) for value in row] for row in tensor.double().tolist()]
        for tensor in (layer.base_weight, layer.lora_A, layer.lora_B)
    )
    result = []
    for i, row in enumerate(W):
        result.append([])
        for j, w in enumerate(row):
            products = [B[i][k] * A[k][j] for k in range(len(A))]
            magnitude = abs(w) + abs(scaling) * sum(map(abs, products))
            result[-1].append((w + scaling * sum(products), magnitude))
    return result


def ulp(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The gap between neighbouring floats of `dtype` at `value`."""
    digits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    smallest = Fraction(torch.finfo(dtype).smallest_normal) * Fraction(2) ** (1 - digits)
    if value == 0:
        return smallest
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    return max(Fraction(2) ** (exponent + 1 - digits), smallest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "cancel", "tiny", "large"])
@pytest.mark.parametrize("r", [1, 3, 16])
def test_merging_is_within_half_an_ulp_and_the_cancellation_of_the_exact_sum(dtype, kind, r):
    """|merged - exact| <= ½ulp + γ_{r+2}·(|W| + |s|·|B|·|A|), u = 2⁻⁵³.

    The first term is one rounding. The second is what r products, their sum, the scaling and adding W lose
    in float64.
    """
    for seed in range(4):
        layer = make_layer(dtype, kind, r, seed=seed)
        exact = exact_merge(layer)
        base = layer.weight.detach().clone()
        layer.merge()
        assert not torch.equal(layer.weight, base)
        for got_row, exact_row in zip(layer.weight.double().tolist(), exact, strict=True):
            for got, (wanted, magnitude) in zip(got_row, exact_row, strict=True):
                bound = ulp(wanted, dtype) / 2 + gamma(r + 2, U64) * magnitude
                assert abs(Fraction(got) - wanted) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_weights_and_constructed_ties_are_within_the_same_bound(dtype):
    """Against NumPy's 80-bit floats, whose own error is 2⁻¹¹ of γ.

    The second half of the rows holds ties: W + ½ulp, and W + ½ulp·(1 ± 2⁻³⁰), from two of the r products.
    """
    n, r = 1024, 4
    layer = make_layer(dtype, r=r, shape=(n, n))
    layer.scaling = 1.0
    ties = slice(n // 2, n)
    with torch.no_grad():
        layer.weight[ties].uniform_(1, 2, generator=torch.Generator().manual_seed(5))
        half_ulp = torch.finfo(dtype).eps / 2
        layer.lora_B[ties] = torch.tensor([half_ulp, half_ulp * 2.0**-30, 0, 0], dtype=layer.lora_B.dtype)
        layer.lora_A[0] = torch.tensor([1.0, -1.0] * (n // 2))
        layer.lora_A[1] = torch.tensor([0.0, 0.0, 1.0, -1.0] * (n // 4))
    W, A, B = (
        t.detach().double().numpy().astype(np.longdouble) for t in (layer.weight, layer.lora_A, layer.lora_B)
    )
    assert np.finfo(np.longdouble).eps < 2.0**-62
    exact = W.copy()
    magnitude = np.abs(W)
    for k in range(r):
        exact += np.outer(B[:, k], A[k])
        magnitude += np.abs(np.outer(B[:, k], A[k]))
    layer.merge()
    error = np.abs(layer.weight.detach().double().numpy().astype(np.longdouble) - exact)
    exponent = np.floor(np.log2(np.maximum(np.abs(exact), float(torch.finfo(dtype).smallest_normal))))
    half_ulps = np.ldexp(np.longdouble(torch.finfo(dtype).eps / 2), exponent.astype(np.int64))
    bound = half_ulps + np.longdouble(float(gamma(r + 2, U64))) * magnitude
    assert (error <= bound * (1 + 2.0**-50)).all()  # of the reference's own rounding
    if dtype != torch.float64:  # where the sum is exact, a tie goes to the even neighbour
        at_ties = np.abs(error[ties] - half_ulps[ties]) < 2.0**-40 * half_ulps[ties]
        assert at_ties.mean() > 0.2
        bits = layer.weight.detach()[ties].view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
        assert ((bits.numpy()[at_ties] & 1) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cycles", [1, 1000])
def test_cycles_give_back_every_bit(dtype, cycles):
    layer = make_layer(dtype, shape=(24, 40))
    with torch.no_grad():
        layer.weight[0, :4] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny])
    before = layer.weight.detach().clone().view(torch.uint8)
    for _ in range(cycles):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.weight.detach().view(torch.uint8), before)
    assert layer._unmerged_weight is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "cancel"])
def test_a_merged_layers_outputs_differ_by_no_more_than_rounding(dtype, kind):
    """Element by element, from the shapes and values at hand; no picked tolerance.

    Both layers compute y = (W + ΔW)·x + b, each with its own roundings. Products are summed in u_acc
    (float32 for 16-bit weights, else the weight's own) and stored in u; adapters compute in u_A.
        unmerged: γ_{in+1}(u_acc)·(|W||x| + |b|) + u·|y₀|       the frozen product, y₀, stored
                  + γ_{in+r+3}(u_A)·|s||B||A||x|                the thin products
                  + (u + u_A)·(|y₀| + |s||B||A||x|)             their sum, stored
        merged:   (½ulp bound of the merge)·|x|
                  + γ_{in+1}(u_acc)·(|W'||x| + |b|) + 2u·|y'|   the merged product, stored
    """
    layer = make_layer(dtype, kind, r=4, shape=(24, 96)).eval()
    x = torch.randn(10, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        unmerged = layer(x).double()
        W, b, A, B = (t.detach().double() for t in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
        layer.merge()
        folded = layer(x).double()
        merged_W = layer.weight.detach().double()
    u = torch.finfo(dtype).eps / 2
    u_acc = max(torch.finfo(torch.float64).eps / 2, min(u, 2.0**-24)) if dtype != torch.float64 else u
    u_A = torch.finfo(layer.lora_A.dtype).eps / 2
    size, r, s = 96, 4, layer.scaling
    X = x.double()
    adapter = s * (X.abs() @ A.abs().T @ B.abs().T)
    frozen = X.abs() @ W.abs().T + b.abs()
    y0 = (X @ W.T + b).abs() + gamma(size + 1, u_acc) * frozen
    bound_unmerged = (
        gamma(size + 1, u_acc) * frozen + 2 * u * y0 + gamma(size + r + 3, u_A) * adapter
        + (u + u_A) * (1 + 2 * u) * (y0 + adapter)
    )  # fmt: skip
    merge_error = u * (W + s * B @ A).abs() + gamma(r + 2, 2.0**-53) * (W.abs() + s * B.abs() @ A.abs())
    merge_error += torch.finfo(dtype).smallest_normal * u  # subnormal results have a fixed ulp
    folded_size = X.abs() @ merged_W.abs().T + b.abs()
    y1 = folded.abs() / (1 - 2 * u)
    bound_merged = X.abs() @ merge_error.T + gamma(size + 1, u_acc) * folded_size + 2 * u * y1
    difference = (unmerged - folded).abs()
    assert difference.max() > 0
    assert (difference <= bound_unmerged + bound_merged).all()
    # and the bound says something: it is far below what the adapter does
    if kind == "plain":
        assert (bound_unmerged + bound_merged).max() < adapter.max() / 4


def test_a_merge_inside_autocast_is_seen_by_the_next_forward():
    layer = make_layer(torch.float32, shape=(8, 16)).eval()
    layer.weight.requires_grad_(True)  # autocast caches the casts of such weights alone
    x = torch.randn(4, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer.enabled = False
        base = layer(x)
        layer.enabled = True
        unmerged = layer(x)
        layer.merge()
        folded = layer(x)
        layer.unmerge()
        again = layer(x)
    assert torch.equal(again, unmerged)
    assert (folded - unmerged).abs().max() < (base - unmerged).abs().max() / 4


def test_dropout_is_never_baked_in():
    layers = [make_layer(torch.float32, lora_dropout=p) for p in (0.0, 0.9)]
    for layer in layers:
        layer.train()
        layer.merge()
    assert torch.equal(layers[0].weight, layers[1].weight)


# --- what torch does with a module, while it is merged --------------------------------------------


@pytest.fixture
def adapted(model, config):
    inject(model, config)
    randomise_adapter(model)
    return model


def test_modes_state_dicts_copies_and_saves_change_nothing(adapted, input_ids, tmp_path):
    merge(adapted)
    with torch.no_grad():
        before = adapted(input_ids).logits
        adapted.train()
        adapted.eval()
        adapted.state_dict()
        copy.deepcopy(adapted)
        save_adapter(adapted, tmp_path, base="tiny")
        adapted.requires_grad_(False)
        adapted.to("cpu")
        assert torch.equal(adapted(input_ids).logits, before)
    assert all(layer.merged for layer in lora_layers(adapted).values())


def test_a_merged_models_state_dict_is_the_unmerged_ones(adapted, config, input_ids):
    unmerged = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    with merged(adapted):
        state = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    assert state.keys() == unmerged.keys()
    assert all(torch.equal(state[key], unmerged[key]) for key in unmerged)
    fresh = tiny_roberta(seed=5)
    inject(fresh, config)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(input_ids).logits, adapted(input_ids).logits)


def test_a_copy_of_a_merged_model_computes_the_same_and_unmerges_by_itself(adapted, input_ids):
    before = {name: layer.weight.detach().clone() for name, layer in lora_layers(adapted).items()}
    merge(adapted)
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(input_ids).logits, adapted(input_ids).logits)
    unmerge(twin)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in lora_layers(twin).items())
    assert all(layer.merged for layer in lora_layers(adapted).values())
    assert not any(torch.equal(layer.weight, before[name]) for name, layer in lora_layers(adapted).items())


def test_the_kept_weight_is_no_alias_and_goes_with_the_merge(adapted):
    merge(adapted)
    for layer in lora_layers(adapted).values():
        assert (
            layer._unmerged_weight.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr()
        )
        kept = layer._unmerged_weight.clone()
        with torch.no_grad():
            layer.weight.add_(1)
        assert torch.equal(layer._unmerged_weight, kept)
    unmerge(adapted)
    assert all(layer._unmerged_weight is None for layer in lora_layers(adapted).values())


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_a_merged_model_to_another_dtype_merges_anew_from_the_base(config, base, dtype):
    """From bfloat16 to bfloat16 the cast changes the adapter alone, which is float32 on 16-bit bases."""
    adapted = tiny_roberta().to(base)
    inject(adapted, config)
    randomise_adapter(adapted)
    assert {layer.lora_A.dtype for layer in lora_layers(adapted).values()} == {torch.float32}
    moved = copy.deepcopy(adapted).to(dtype)
    merge(moved)
    merge(adapted)
    adapted.to(dtype)
    for (_, layer), (_, wanted) in zip(lora_layers(adapted).items(), lora_layers(moved).items(), strict=True):
        assert layer.merged
        assert layer.weight.dtype == layer._unmerged_weight.dtype == dtype
        assert torch.equal(layer.weight, wanted.weight)
        assert torch.equal(layer._unmerged_weight, wanted._unmerged_weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cycles_give_back_every_bit_on_cuda(dtype):
    layer = make_layer(dtype, shape=(24, 40)).to("cuda")
    before = layer.weight.detach().clone().view(torch.uint8)
    for _ in range(1000):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.weight.detach().view(torch.uint8), before)
    layer.merge()
    layer.to("cpu")
    layer.unmerge()
    assert torch.equal(layer.weight.detach().view(torch.uint8), before.cpu())
