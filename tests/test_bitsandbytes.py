"""NF4 here is bitsandbytes' NF4, byte for byte. Runs where bitsandbytes is installed: `make test-peers`."""

import pytest
import torch

from lora.quantised.nf4 import ABSMAX_BLOCK, BLOCK, NF4, absmax_levels
from model.minilm import minilm_state

bnb = pytest.importorskip("bitsandbytes.functional")

RANDOM = 100


def random_matrix(seed):
    """A matrix of random size and scale, of which a tenth is zero."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (16 * int(n) for n in torch.randint(1, 40, (2,), generator=generator))
    scale = 10 ** float(torch.randn(1, generator=generator))
    weight = scale * torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) > 0.1)


def quantised_by_them(weight):
    """Their codes and state. As one row: their CPU kernel mixes up the blocks of rows of, say, 96 numbers."""
    return bnb.quantize_4bit(weight.view(1, -1), quant_type="nf4", blocksize=BLOCK, compress_statistics=True)


MATRICES = {name: tensor for name, tensor in minilm_state().items() if tensor.ndim == 2}


def test_the_256_levels_are_theirs():
    assert torch.equal(absmax_levels(), bnb.create_dynamic_map())


@pytest.mark.parametrize("weights", ["random", "minilm"])
def test_codes_scales_and_values_are_theirs(weights):
    matrices = {seed: random_matrix(seed) for seed in range(RANDOM)} if weights == "random" else MATRICES
    assert len(matrices) >= 38
    blocks = others = 0
    for name, weight in matrices.items():
        packed, state = quantised_by_them(weight)
        here = NF4.quantise(weight)
        assert torch.equal(here.codes, packed.flatten()), name
        assert torch.equal(here.absmax_scales, state.state2.absmax), name
        assert torch.equal(here.absmax_mean, state.offset), name

        # Their CPU kernel rounds absmax / scale before it compares it with the levels, so that a value near
        # the middle of two levels can get the farther one: by 2⁻¹⁵ at most.
        theirs = state.absmax.flatten()
        different = here.absmax_codes != theirs
        absmax = weight.reshape(-1, BLOCK).abs().amax(dim=1)
        scales = here.absmax_scales.repeat_interleave(ABSMAX_BLOCK)[: len(absmax)]
        scaled = ((absmax - here.absmax_mean) / scales)[different]
        errors = [
            (absmax_levels()[codes.int()][different] - scaled).abs() for codes in (here.absmax_codes, theirs)
        ]
        assert (errors[0] <= errors[1]).all(), name
        assert (errors[1] - errors[0] <= 2**-15).all(), name
        blocks, others = blocks + len(absmax), others + int(different.sum())

        same = ~different.repeat_interleave(BLOCK).view(weight.shape)
        for dtype in (torch.float32, torch.bfloat16):
            state.dtype = dtype
            found = bnb.dequantize_4bit(packed, state).view(weight.shape)
            assert torch.equal(here.dequantise(dtype)[same], found[same]), (name, dtype)
        # With their codes in place of ours, every value is theirs.
        swapped = NF4(here.codes, theirs, here.absmax_scales, here.absmax_mean, here.size)
        assert torch.equal(swapped.dequantise(torch.bfloat16), found), name
    assert others <= 0.01 * blocks


@pytest.mark.parametrize("weight", [torch.zeros(16, 8), torch.ones(8, 64), torch.full((8, 64), 1e-40)])
def test_blocks_without_a_spread_give_their_values(weight):
    packed, state = quantised_by_them(weight)
    assert torch.equal(NF4.quantise(weight).dequantise().view(1, -1), bnb.dequantize_4bit(packed, state))
