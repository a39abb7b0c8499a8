"""The mathematics of anatomy: against brute force in float64, and against cases whose answer is planted.

Tolerances: 1e-12 of the largest value, some thousand times float64's rounding, where another order of sums
is all that differs; anything looser says why.
"""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import randomise_adapter

from lora import inject, merge
from lora.ablate import enable_only, scaled, truncated
from lora.adapted import lora_layers
from lora.anatomy import (
    amplification,
    captured_energy,
    delta_svd,
    effective_rank,
    energy,
    expected_projected_norm,
    expected_similarity,
    intruders,
    nearest_cosines,
    principal_angles,
    projected_norm,
    rank_holding,
    singular_values_from_grams,
    stable_rank,
    subspace_similarity,
    svd,
)

OUT, IN = 20, 30


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def directions(d, k, seed=0):
    """Orthonormal columns, (d, k), drawn evenly over all such."""
    return torch.linalg.qr(randn(d, k, seed=seed))[0]


def adapter(r, seed=0, dtype=torch.float32):
    return randn(r, IN, seed=seed).to(dtype), randn(OUT, r, seed=seed + 100).to(dtype)


def beside(X):
    """A unit vector that is orthogonal to every column of X."""
    x = randn(len(X), seed=9)
    x = x - X @ (X.T @ x)
    return x / x.norm()


def planted(S, seed=0):
    """A matrix (OUT, IN) with these singular values, and its directions."""
    S = torch.tensor(S, dtype=torch.float64)
    U, V = directions(OUT, len(S), seed), directions(IN, len(S), seed + 1)
    return (U * S) @ V.T, U, V


def near(value, wanted, rel=1e-12):
    value, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (value, wanted))
    assert value.shape == wanted.shape
    assert wanted.abs().max() > 0
    assert (value - wanted).abs().max() <= rel * wanted.abs().max()


@pytest.mark.parametrize("r", [1, 3, 8, 20, 25])
@pytest.mark.parametrize("scaling", [2.0, -0.5])
def test_the_core_has_the_singular_values_and_vectors_of_the_whole_product(r, scaling):
    A, B = adapter(r)
    found = delta_svd(A, B, scaling)
    product = scaling * (B.double().numpy() @ A.double().numpy())
    k = min(r, OUT)
    assert found.U.shape == (OUT, k)
    assert found.V.shape == (IN, k)
    near(found.S, torch.from_numpy(np.linalg.svd(product, compute_uv=False)[:k]))
    near((found.U * found.S) @ found.V.T, torch.from_numpy(product))
    near(found.U.T @ found.U, torch.eye(k))
    near(found.V.T @ found.V, torch.eye(k))


def test_an_adapter_of_a_planted_rank_shows_that_rank():
    """B's eight columns are combinations of three: five singular values are nothing but rounding."""
    A, _ = adapter(8, dtype=torch.float64)
    B = randn(OUT, 3, seed=5) @ randn(3, 8, seed=6)
    found = delta_svd(A, B, 1.0)
    assert (found.S[3:] <= 1e-14 * found.S[0]).all()
    assert found.S[2] > 1e-3 * found.S[0]
    assert rank_holding(found.S, 0.999999) == 3


def test_grams_alone_give_the_singular_values_to_half_the_digits():
    A, B = adapter(6, dtype=torch.float64)
    near(singular_values_from_grams(A @ A.T, B.T @ B), delta_svd(A, B, 1.0).S, rel=1e-7)
    zero = singular_values_from_grams(A @ A.T, torch.zeros(6, 6, dtype=torch.float64))
    assert torch.equal(zero, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_rank_of_equal_singular_values_is_their_number(count):
    S = torch.cat([torch.full((count,), 0.3), torch.zeros(4)]).double()
    assert effective_rank(S) == pytest.approx(count, rel=1e-12)
    assert stable_rank(S) == pytest.approx(count, rel=1e-12)
    assert rank_holding(S, 0.999) == count
    near(energy(S)[:count], [number / count for number in range(1, count + 1)])


def test_ranks_against_sums_by_hand():
    S = [4.0, 2.0, 1.0]
    p = [value / 7 for value in S]
    tensor = torch.tensor(S, dtype=torch.float64)
    assert effective_rank(tensor) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-12)
    assert stable_rank(tensor) == pytest.approx(21 / 16, rel=1e-12)
    near(energy(tensor), torch.tensor([16 / 21, 20 / 21, 1], dtype=torch.float64))
    assert [rank_holding(tensor, share) for share in (0.7, 0.9, 0.95, 0.99)] == [1, 2, 2, 3]


def test_an_untrained_adapter_has_no_rank_and_no_energy():
    found = delta_svd(adapter(4)[0], torch.zeros(OUT, 4), 2.0)
    assert effective_rank(found.S) == stable_rank(found.S) == rank_holding(found.S, 0.9) == 0
    assert not energy(found.S).any()
    assert amplification(found, randn(OUT, IN)) == 0


def test_similarity_against_equation_four_term_by_term():
    X, Y = directions(IN, 4, 1), directions(IN, 7, 2)
    wanted = [
        [float((X[:, :i].T @ Y[:, :j]).norm() ** 2) / min(i, j) for j in range(1, 8)] for i in range(1, 5)
    ]
    near(subspace_similarity(X, Y), wanted)


def test_similarity_of_equal_nested_and_orthogonal_spans():
    X = directions(IN, 8)
    near(subspace_similarity(X, X).diagonal(), torch.ones(8))
    near(subspace_similarity(X[:, :3], X)[-1, 2:], torch.ones(6))  # three directions inside eight
    assert subspace_similarity(X[:, :4], X[:, 4:]).max() < 1e-28
    turned = X[:, :4] @ directions(4, 4, 9)  # the same span, in other directions
    near(subspace_similarity(X[:, :4], turned)[-1, -1], 1.0)
    assert subspace_similarity(X[:, :4], turned)[0, 0] < 0.9


def test_the_baseline_is_what_random_directions_give():
    """Over 2,000 draws; the mean of values in [0, 1] is within 5 standard errors, below 5 / (2·√2000)."""
    draws = torch.stack(
        [subspace_similarity(directions(12, 2, 2 * n), directions(12, 5, 2 * n + 1)) for n in range(2000)]
    )
    expected = expected_similarity(2, 5, 12)
    errors = 5 * draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() < errors).all()
    assert (errors < 0.15 * expected).all()

    M = randn(10, 12, seed=3)
    squares = torch.tensor(
        [projected_norm(M, directions(10, 3, 2 * n), directions(12, 3, 2 * n + 1)) ** 2 for n in range(2000)]
    )
    wanted = expected_projected_norm(float(M.norm()), (10, 12), 3) ** 2
    assert float(squares.mean()) == pytest.approx(wanted, abs=float(5 * squares.std()) / math.sqrt(2000))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 0.7, math.pi / 2 - 1e-9, math.pi / 2])
def test_principal_angles_are_the_planted_ones_small_and_large(angle):
    """One direction turned by an angle, one shared, one at right angles; also where a cosine is blind."""
    E = directions(IN, 5)
    X = E[:, :3]
    Y = torch.stack([math.cos(angle) * E[:, 0] + math.sin(angle) * E[:, 3], E[:, 1], E[:, 4]], dim=1)
    wanted = torch.tensor(sorted([angle, 0.0, math.pi / 2]), dtype=torch.float64)
    found = principal_angles(X, Y @ directions(3, 3, 4))
    assert (found - wanted).abs().max() < 1e-14
    assert (principal_angles(Y, X) - wanted).abs().max() < 1e-14
    assert (principal_angles(X[:, :1], Y) - torch.tensor([angle], dtype=torch.float64)).abs().max() < 1e-14


def test_principal_angles_against_numpy():
    X, Y = directions(IN, 6, 1), directions(IN, 4, 2)
    wanted = np.sort(np.arccos(np.linalg.svd(X.numpy().T @ Y.numpy(), compute_uv=False)))
    near(principal_angles(X, Y), torch.from_numpy(wanted))


def test_amplification_is_the_planted_ratio():
    """W has 0.5 along the directions where ΔW has 6 and 8: ‖ΔW‖ = 10, ‖UᵀWV‖ = 0.5·√2."""
    delta, U, V = planted([8.0, 6.0])
    weight = randn(OUT, IN, seed=8)
    weight += U @ (0.5 * torch.eye(2, dtype=torch.float64) - U.T @ weight @ V) @ V.T
    found = svd(delta)
    found = type(found)(found.U[:, :2], found.S[:2], found.V[:, :2])
    assert amplification(found, weight) == pytest.approx(10 / math.sqrt(0.5), rel=1e-12)
    assert projected_norm(weight, U, V) == pytest.approx(math.sqrt(0.5), rel=1e-12)


def test_the_most_of_w_is_in_its_own_directions():
    weight = svd(randn(OUT, IN))
    M = (weight.U * weight.S) @ weight.V.T
    own = projected_norm(M, weight.U[:, :4], weight.V[:, :4])
    assert own == pytest.approx(float(weight.S[:4].norm()), rel=1e-12)
    assert own > projected_norm(M, directions(OUT, 4), directions(IN, 4))


def test_captured_energy_against_a_projection_written_out():
    M, U, V = randn(OUT, IN), directions(OUT, 5), directions(IN, 5, 1)
    wanted = [
        float((U[:, :k] @ U[:, :k].T @ M @ V[:, :k] @ V[:, :k].T).norm() ** 2 / M.norm() ** 2)
        for k in range(1, 6)
    ]
    near(captured_energy(M, U, V), wanted)
    own = svd(M)
    near(captured_energy(M, own.U, own.V), energy(own.S))


def test_the_best_approximation_of_a_rank_loses_the_energy_of_the_rest():
    M = randn(OUT, IN)
    found = svd(M)
    for rank in (0, 1, 7):
        rest = M - found.truncated(rank)
        assert float(rest.norm()) == pytest.approx(float(found.S[rank:].norm()), rel=1e-12)
        assert int(torch.linalg.matrix_rank(found.truncated(rank))) == rank


def test_a_planted_intruder_is_found_and_an_old_direction_is_not():
    """W spans 6 directions of 20. What is added along a seventh is an intruder, along the second none."""
    weight, U, V = planted([9.0, 7.0, 5.0, 4.0, 3.0, 2.0])
    base = svd(weight).U[:, :6]
    outside = beside(U)
    tuned = svd(weight + 20 * torch.outer(outside, beside(V)))
    cosines = nearest_cosines(tuned.U[:, :6], base)  # 20 along the intruder, then 9, 7, 5, 4, 3
    assert intruders(cosines, 0.5) == 1
    assert cosines[0] < 1e-12
    near(cosines[1:], torch.ones(5))
    louder = svd(weight + 20 * torch.outer(U[:, 1], V[:, 1]))
    near(nearest_cosines(louder.U[:, :6], base), torch.ones(6), rel=1e-10)  # vectors, by gaps of 1
    half = torch.stack([U[:, 0], (U[:, 1] + outside) / math.sqrt(2)], dim=1)
    near(nearest_cosines(half, U), [1.0, math.sqrt(0.5)])
    assert intruders(nearest_cosines(half, -U), 0.7) == 0  # a sign means nothing
    assert intruders(nearest_cosines(half, -U), 0.71) == 1


# Taking an adapter apart


@pytest.fixture
def adapted(model, config):
    inject(model, config)
    randomise_adapter(model)
    return model


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_as_before(model, before, scalings):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [layer.scaling for layer in lora_layers(model).values()] == scalings
    assert all(layer.enabled for layer in lora_layers(model).values())


@pytest.mark.parametrize(
    "change", [lambda m: enable_only(m, []), lambda m: scaled(m, 0.0), lambda m: truncated(m, 1)]
)
def test_every_change_shows_at_once_and_every_bit_is_put_back_on_an_exception_too(adapted, input_ids, change):
    before, scalings = state(adapted), [layer.scaling for layer in lora_layers(adapted).values()]
    whole = logits(adapted, input_ids)
    with change(adapted):
        assert not torch.equal(logits(adapted, input_ids), whole)
    assert_as_before(adapted, before, scalings)
    with pytest.raises(MemoryError), change(adapted):
        raise MemoryError
    assert_as_before(adapted, before, scalings)
    assert torch.equal(logits(adapted, input_ids), whole)


def test_enable_only_leaves_the_named_layers_enabled(adapted, input_ids):
    names = list(lora_layers(adapted))
    by_hand = copy.deepcopy(adapted)
    with torch.no_grad():
        for name in names[1:]:
            by_hand.get_parameter(f"{name}.lora_B").zero_()
    with enable_only(adapted, names[:1]):
        # a sum with an exact zero in it
        torch.testing.assert_close(
            logits(adapted, input_ids), logits(by_hand, input_ids), rtol=1e-6, atol=1e-6
        )
    with pytest.raises(ValueError, match="not an adapted layer"), enable_only(adapted, ["classifier"]):
        pass


def test_scaled_multiplies_every_delta(adapted):
    before = {name: layer.delta_weight() for name, layer in lora_layers(adapted).items()}
    with scaled(adapted, -1.5):
        for name, layer in lora_layers(adapted).items():
            near(layer.delta_weight(), -1.5 * before[name])


@pytest.mark.parametrize("rank", [0, 1, 3, 4, 9])
def test_truncated_leaves_the_best_approximation_of_every_delta(adapted, rank):
    wanted = {name: svd(layer.delta_weight()).truncated(rank) for name, layer in lora_layers(adapted).items()}
    before = state(adapted)
    with truncated(adapted, rank):
        for name, layer in lora_layers(adapted).items():
            if rank:
                near(layer.delta_weight(), wanted[name], rel=4e-7)  # B is rounded to float32
            else:
                assert not layer.delta_weight().any()
        if rank >= 4:
            assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


def test_a_merged_adapter_cannot_be_taken_apart(adapted):
    merge(adapted)
    for change in (enable_only(adapted, []), scaled(adapted, 0.0), truncated(adapted, 1)):
        with pytest.raises(RuntimeError, match="is merged; unmerge the model first"), change:
            pass
