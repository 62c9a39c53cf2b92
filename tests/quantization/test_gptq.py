"""The recursion against explicit inverse updates, W' against least squares, and no code that errs more than nearest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qconv.quantization.gptq import (
    WeightGrid,
    descend_coordinates,
    factor_upper,
    fit_scale_factors,
    order_hessian,
    round_second_order,
    solve_weights,
)
from qconv.quantization.input_moments import accumulate_moments


def drawn(seed: int, groups: int = 2, outputs: int = 3, inputs: int = 7, rows: int = 200):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((groups, inputs, inputs))
    x = rng.standard_normal((groups, rows, inputs)) @ mix
    weight = rng.standard_normal((groups, outputs, inputs))
    hessian = np.swapaxes(x, 1, 2) @ x / rows
    return weight, hessian, x


def grid_for(weight, bits: int = 3) -> WeightGrid:
    most = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(axis=2, keepdims=True) / most
    return WeightGrid(scale, np.zeros_like(scale), -most, most)


def by_inverse_updates(weight, hessian, grid: WeightGrid):
    """OBQ's own words for one group: round a column, spread its error by the inverse of H, strike the column out."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    left, codes = weight.copy(), np.empty_like(weight)
    remaining = list(order)
    while remaining:
        inverse = np.linalg.inv(hessian[np.ix_(remaining, remaining)])
        m = remaining[0]
        scale = grid.scale[0, :, 0]
        codes[:, m] = np.clip(np.rint(left[:, m] / scale), grid.low, grid.high)
        error = (left[:, m] - codes[:, m] * scale) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining.pop(0)
    return codes


def error_of(real: NDArray, weight: NDArray, hessian: NDArray) -> NDArray:
    """(Q - W) H (Q - W)^T of each output, (G, O)."""
    lost = real - weight
    return np.asarray(np.einsum("gok,gok->go", lost @ hessian, lost))


@pytest.mark.parametrize("seed", range(4))
def test_the_recursion_is_that_of_explicit_inverse_updates(seed) -> None:
    weight, hessian, _ = drawn(seed, groups=1, inputs=150)
    grid = grid_for(weight)
    found, error = round_second_order(weight, order_hessian(hessian, damping=0.0), grid)
    np.testing.assert_allclose(error, error_of(grid.real(found), weight, hessian), rtol=1e-6)
    np.testing.assert_array_equal(found[0], by_inverse_updates(weight[0], hessian[0], grid))


def test_the_factor_is_upper_and_a_root() -> None:
    _, hessian, _ = drawn(0)
    factor = factor_upper(hessian)
    np.testing.assert_allclose(factor @ np.swapaxes(factor, 1, 2), hessian, atol=1e-9)
    np.testing.assert_array_equal(np.tril(factor[0], -1), 0)


def test_without_a_ridge_the_weights_are_those_of_least_squares() -> None:
    weight, _, x_f = drawn(1)
    x_q = x_f + 0.1 * np.random.default_rng(5).standard_normal(x_f.shape)
    hessian, cross = (np.swapaxes(x, 1, 2) @ x_q / x_q.shape[1] for x in (x_q, x_f))
    found = solve_weights(weight, hessian, cross, ridge=0.0)
    for g in range(2):
        wanted = x_f[g] @ weight[g].T
        expected, *_ = np.linalg.lstsq(x_q[g], wanted, rcond=None)
        np.testing.assert_allclose(found[g], expected.T, atol=1e-5)


def test_a_large_ridge_leaves_the_weights() -> None:
    weight, hessian, _ = drawn(2)
    np.testing.assert_allclose(solve_weights(weight, hessian, 0.5 * hessian, ridge=1e9), weight, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_descent_never_errs_more_than_where_it_began(seed, bits) -> None:
    weight, hessian, _ = drawn(seed, inputs=9)
    grid = grid_for(weight, bits)
    start = grid.codes(weight)
    found = descend_coordinates(start, weight, hessian, grid, sweeps=3)
    before, after = (error_of(grid.real(codes), weight, hessian) for codes in (start, found))
    assert np.all(after <= before * (1 + 1e-9))
    assert np.all(np.abs(found) <= grid.high)


def test_descent_finds_the_best_codes_of_two_columns() -> None:
    """H = [[1, .9], [.9, 1]], w = (.4, .4) on whole numbers: (0, 1) and (1, 0) err .088, nearest (0, 0) .608."""
    hessian = np.array([[[1.0, 0.9], [0.9, 1.0]]])
    weight = np.array([[[0.4, 0.4]]])
    grid = WeightGrid(np.ones((1, 1, 1)), np.zeros((1, 1, 1)), -4, 4)
    nearest = grid.codes(weight)
    assert error_of(nearest, weight, hessian) == pytest.approx(0.608)
    found = descend_coordinates(nearest, weight, hessian, grid, sweeps=2)
    assert error_of(found, weight, hessian) == pytest.approx(0.36 + 0.16 - 2 * 0.9 * 0.6 * 0.4)


def test_correlated_inputs_gain_by_second_order() -> None:
    gains = []
    for seed in range(20):
        weight, hessian, _ = drawn(seed, inputs=40)
        grid = grid_for(weight)
        second, first = (
            error_of(grid.real(codes), weight, hessian).sum()
            for codes in (round_second_order(weight, order_hessian(hessian), grid)[0], grid.codes(weight))
        )
        gains.append(second / first)
    assert max(gains) < 1
    assert np.mean(gains) < 0.5


def test_the_fitted_factor_has_the_least_error() -> None:
    weight, hessian, _ = drawn(3)
    grid = grid_for(weight)
    codes = round_second_order(weight, order_hessian(hessian), grid)[0]
    numerator, denominator = fit_scale_factors(codes, weight, hessian, grid)
    factor = (numerator / denominator)[:, :, None]
    least = error_of(grid.real(codes) * factor, weight, hessian)
    for other in (0.98, 1.02):
        assert np.all(error_of(grid.real(codes) * factor * other, weight, hessian) > least)


def test_a_grid_of_its_own_for_each_column() -> None:
    """Zero points and scales by column, as blocks have them: one column after the other, H diagonal, is nearest."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((1, 2, 5))
    grid = WeightGrid(rng.uniform(0.1, 0.3, (1, 2, 5)), rng.integers(-2, 3, (1, 2, 5)).astype(float), -8, 7)
    hessian = np.diag(rng.uniform(1, 2, 5))[None]
    np.testing.assert_array_equal(round_second_order(weight, order_hessian(hessian), grid)[0], grid.codes(weight))


def test_moments_are_covariances_of_what_is_summed() -> None:
    """Every eighth batch is kept apart; the means are far from zero, where float32 would lose the rest."""
    rng = np.random.default_rng(0)
    pairs = [tuple((1000 + rng.standard_normal((2, 30, 4))).astype(np.float32) for _ in range(2)) for _ in range(16)]
    found = accumulate_moments(iter(pairs))
    summed = [pair for index, pair in enumerate(pairs) if index % 8 != 7]
    x_f, x_q = (np.concatenate([pair[side] for pair in summed], axis=1).astype(np.float64) for side in (0, 1))
    for g in range(2):
        both = np.cov(x_f[g].T, x_q[g].T, bias=True)
        np.testing.assert_allclose(found.blocks[0].hessian[g], both[4:, 4:], atol=1e-4)
        np.testing.assert_allclose(found.blocks[0].cross[g], both[:4, 4:], atol=1e-4)
    np.testing.assert_allclose(found.mean, x_q.mean(axis=1), rtol=1e-7)
    np.testing.assert_allclose(found.float_mean, x_f.mean(axis=1), rtol=1e-7)
    assert found.kept[0].shape == (2, 60, 4)
    np.testing.assert_allclose(found.kept[1][0, :30], pairs[7][1][0] - x_q[0].mean(axis=0), atol=1e-3)


def test_many_inputs_are_taken_apart(monkeypatch) -> None:
    monkeypatch.setattr("qconv.quantization.input_moments.LARGEST_BLOCK", 3)
    rows = np.random.default_rng(0).standard_normal((1, 50, 7)).astype(np.float32)
    found = accumulate_moments([(rows, rows)])
    assert [block.part for block in found.blocks] == [slice(0, 2), slice(2, 4), slice(4, 7)]
    np.testing.assert_allclose(found.blocks[2].hessian[0], np.cov(rows[0, :, 4:].T, bias=True), atol=1e-5)
