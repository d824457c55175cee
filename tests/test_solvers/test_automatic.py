"""What all solvers have in common, and how `solver=None` chooses among the exact ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import natgrad_jax as ng
from natgrad_jax.curvature import curvature
from natgrad_jax.direction import empty_info
from natgrad_jax.solvers import automatic

RNG = np.random.default_rng(6)

# With residuals linear in the parameters the rows are the data: R = X / sqrt(M).
METRIC = ng.gauss_newton(lambda params, x: x @ params)
EXACT = {
    "cholesky": ng.cholesky(),
    "woodbury": ng.woodbury(),
    "qr": ng.qr(),
    "spectral": ng.spectral(),
    "cg": ng.cg(tol=1e-12),
    "None": None,
}
ALL = EXACT | {"diagonal": ng.diagonal(), "block_diagonal": ng.block_diagonal()}
every_solver = pytest.mark.parametrize("solver", ALL.values(), ids=ALL.keys())
exact_solvers = pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT.keys())
direct_solvers = pytest.mark.parametrize("name", ["cholesky", "qr", "woodbury", "spectral"])

GRADIENT = RNG.normal(size=7)
# Fewer rows than parameters, and more; the second pair has three modes less.
SHAPES = {"wide": RNG.normal(size=(4, 7)), "tall": RNG.normal(size=(9, 7))}
DEFICIENT = {
    "wide": RNG.normal(size=(4, 2)) @ RNG.normal(size=(2, 7)),
    "tall": RNG.normal(size=(9, 4)) @ RNG.normal(size=(4, 7)),
}


def solve(solver, rows, g, damping):
    x, zeros = rows * np.asarray(len(rows) ** 0.5, rows.dtype), np.zeros_like(g)
    d, info = ng.natural_gradient_direction(METRIC, zeros, x, g, solver=solver, damping=damping)
    return np.asarray(d), info


def error(value, expected) -> float:
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def damped_inverse(rows, damping):
    rows = rows.astype(np.float64)
    if damping == 0:
        return np.linalg.pinv(rows.T @ rows, rcond=1e-13, hermitian=True)
    return np.linalg.inv(rows.T @ rows + damping * np.eye(rows.shape[1]))


def with_singular_values(values, columns=7, random=RNG):
    left = scipy.linalg.qr(random.normal(size=(len(values), len(values))))[0]
    right = scipy.linalg.qr(random.normal(size=(columns, columns)))[0][: len(values)]
    return (left * values) @ right


@pytest.mark.usefixtures("x64")
@exact_solvers
@pytest.mark.parametrize("shape", SHAPES)
def test_without_damping_exact_solvers_are_the_pseudo_inverse(solver, shape):
    # The gradient lies partly outside the range.
    for rows in (DEFICIENT[shape], SHAPES[shape]):
        d, _ = solve(solver, rows, GRADIENT, 0.0)
        assert error(d, damped_inverse(rows, 0) @ GRADIENT) < 1e-8


@pytest.mark.usefixtures("x64")
@exact_solvers
def test_modes_below_the_cut_count_as_null(solver):
    # Rows themselves tell a mode of 1e-9 from rounding, their products do not.
    last = 1e-17 if solver in (None, EXACT["qr"]) else 1e-9
    rows = with_singular_values([1.0, 0.5, 0.2, last])
    d, _ = solve(solver, rows, GRADIENT, 0.0)
    _, s, modes = np.linalg.svd(rows)
    expected = modes[:3].T @ (modes[:3] @ GRADIENT / s[:3] ** 2)
    assert error(d, expected) < 1e-8


@exact_solvers
@pytest.mark.parametrize("shape", SHAPES)
def test_without_damping_in_float32(solver, shape):
    rows, g = DEFICIENT[shape].astype(np.float32), GRADIENT.astype(np.float32)
    assert error(solve(solver, rows, g, 0.0)[0], damped_inverse(DEFICIENT[shape], 0) @ g) < 1e-3


@exact_solvers
@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
def test_accuracy_in_float32_is_eps_times_largest_eigenvalue_over_damping(solver, damping):
    g, errors = GRADIENT.astype(np.float32), []
    for _ in range(5):
        rows = with_singular_values([1.0, 0.3, 0.1, 0.01]).astype(np.float32)
        errors.append(error(solve(solver, rows, g, damping)[0], damped_inverse(rows, damping) @ g))
    assert np.median(errors) < 10 * np.finfo(np.float32).eps / damping


@every_solver
@pytest.mark.parametrize("damping", [1e-7, 1e-20, 1e-38])
def test_tiny_damping_in_float32_stays_finite(solver, damping):
    rows, g = DEFICIENT["wide"].astype(np.float32), GRADIENT.astype(np.float32)
    # A gradient that makes the result representable: g / damping would not be.
    assert np.isfinite(solve(solver, rows, rows.T @ (rows @ g), damping)[0]).all()


@every_solver
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_zero_gradient_gives_a_zero_direction(solver, damping):
    d, info = solve(solver, np.float32(SHAPES["wide"]), np.zeros(7, np.float32), damping)
    np.testing.assert_array_equal(d, 0)
    assert all(np.isfinite(leaf) for leaf in info)


@every_solver
@pytest.mark.parametrize(("damping", "expected"), [(0.0, 0.0), (0.5, 2.0)])
def test_a_zero_metric_leaves_the_damping_alone(solver, damping, expected):
    g = GRADIENT.astype(np.float32)
    d, info = solve(solver, np.zeros((4, 7), np.float32), g, damping)
    np.testing.assert_allclose(d, expected * g, rtol=1e-6)
    assert all(np.isfinite(leaf) for leaf in info)


@every_solver
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_stays_so(solver, bad):
    g = GRADIENT.astype(np.float32)
    g[2] = bad
    for damping in (0.0, 0.1):
        assert not np.isfinite(solve(solver, np.float32(SHAPES["wide"]), g, damping)[0]).any()


@every_solver
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**120])
def test_the_scale_of_the_gradient_neither_under_nor_overflows(solver, scale):
    # Rows of small norm times 2^120 would overflow when squared.
    rows, g = np.float32(SHAPES["wide"]), GRADIENT.astype(np.float32)
    scaled, _ = solve(solver, rows, np.float32(scale) * g, 0.5)
    np.testing.assert_array_equal(scaled, np.float32(scale) * solve(solver, rows, g, 0.5)[0])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["cholesky", "qr", "woodbury", "cg", "None"])
def test_solves_map_over_gradients_and_dampings(name):
    solver = ALL[name]
    gradients, dampings = RNG.normal(size=(3, 7)), np.array([0.1, 0.0, 1.0])
    batch = SHAPES["wide"] * 2

    def one(g, damping):
        return ng.natural_gradient_direction(
            METRIC, jnp.zeros(7), batch, g, solver=solver, damping=damping
        )[0]

    mapped = jax.jit(jax.vmap(one))(gradients, dampings)
    for d, g, damping in zip(mapped, gradients, dampings, strict=True):
        assert error(d, solve(solver, SHAPES["wide"], g, damping)[0]) < 1e-9


# Diagnostics.


def kinds(info):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), info)


@every_solver
def test_info_has_the_same_fields_and_dtypes_for_every_solver(solver, x64):
    for dtype in (np.float32, np.float64):
        rows, g = SHAPES["wide"].astype(dtype), GRADIENT.astype(dtype)
        assert kinds(solve(solver, rows, g, 0.1)[1]) == kinds(empty_info())


@pytest.mark.usefixtures("x64")
@every_solver
def test_info_gives_the_damping_and_the_slope(solver):
    d, info = solve(solver, SHAPES["wide"], GRADIENT, 0.1)
    assert float(info.damping) == np.float32(0.1)
    assert float(info.grad_dot_direction) == pytest.approx(GRADIENT @ d, rel=1e-6)
    assert float(info.grad_dot_direction) > 0


@direct_solvers
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4])
def test_share_outside_the_row_space_is_that_of_a_dense_projector(name, dtype, damping, x64):
    for rows in (SHAPES["wide"], DEFICIENT["tall"]):
        inside = np.linalg.pinv(rows, rcond=1e-12) @ rows
        d = damped_inverse(rows, damping) @ GRADIENT
        expected = np.linalg.norm(d - inside @ d) / np.linalg.norm(d)
        assert 0.1 < expected < 1
        _, info = solve(ALL[name], rows.astype(dtype), GRADIENT.astype(dtype), damping)
        assert float(info.outside_row_space) == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("x64")
@direct_solvers
def test_nothing_lies_outside_a_full_row_space(name):
    # A share is a difference of squares, so its rounding is the square root of eps.
    for damping in (0.1, 0.0):
        _, info = solve(ALL[name], SHAPES["tall"], GRADIENT, damping)
        assert float(info.outside_row_space) < 1e-6
    within = SHAPES["wide"].T @ np.ones(4)
    _, info = solve(ALL[name], SHAPES["wide"], within, 0.1)
    assert float(info.outside_row_space) < 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rows", [SHAPES["wide"], DEFICIENT["tall"]], ids=["wide", "deficient"])
def test_conjugate_gradients_bound_the_share_outside_and_find_it_at_the_end(rows):
    inside = np.linalg.pinv(rows, rcond=1e-12) @ rows
    d = damped_inverse(rows, 0.1) @ GRADIENT
    expected = np.linalg.norm(d - inside @ d) / np.linalg.norm(d)
    shares = [
        float(solve(ng.cg(max_iterations=k, tol=1e-9), rows, GRADIENT, 0.1)[1].outside_row_space)
        for k in (1, 2, 20)
    ]
    assert shares[0] >= shares[1] >= 0.999 * expected
    assert shares[2] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["diagonal", "block_diagonal"])
def test_an_approximation_tells_where_it_is_zero(name):
    rows = np.float32(SHAPES["wide"])
    assert float(solve(ALL[name], rows, np.float32(GRADIENT), 0.1)[1].outside_row_space) == 0
    assert float(solve(ALL[name], 0 * rows, np.float32(GRADIENT), 0.1)[1].outside_row_space) == 1


def test_a_share_that_is_not_measured_is_minus_one():
    solver = ng.cg(preconditioner=ng.diagonal())
    _, info = solve(solver, np.float32(SHAPES["wide"]), np.float32(GRADIENT), 0.1)
    assert float(info.outside_row_space) == -1


def actual_residual(rows, d, g, damping) -> float:
    return np.linalg.norm(rows.T @ (rows @ d) + damping * d - g) / np.linalg.norm(g)


@pytest.mark.usefixtures("x64")
@exact_solvers
def test_without_damping_the_residual_is_what_lies_outside_the_range(solver):
    for rows in DEFICIENT.values():
        d, info = solve(solver, rows, GRADIENT, 0.0)
        expected = actual_residual(rows, d, GRADIENT, 0.0)
        assert 0.1 < expected < 1
        assert float(info.relative_residual) == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("x64")
@exact_solvers
def test_exact_solves_report_a_residual_of_rounding(solver):
    for rows in SHAPES.values():
        d, info = solve(solver, rows, GRADIENT, 0.1)
        assert actual_residual(rows, d, GRADIENT, 0.1) < 1e-11
        # Where it is a difference of squares its rounding is the square root of eps.
        assert 0 <= float(info.relative_residual) < 1e-7


@pytest.mark.parametrize("name", ["cholesky", "qr", "woodbury", "spectral"])
@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
def test_residuals_in_float32_are_honest(name, damping):
    """Both are rounding here: told within a factor of ten, nine times in ten, never far off."""
    random, told = np.random.default_rng(17), []
    for _ in range(50):
        rows = with_singular_values([1.0, 0.3, 0.1, 0.01], random=random).astype(np.float32)
        g = GRADIENT.astype(np.float32)
        d, info = solve(ALL[name], rows, g, damping)
        actual = actual_residual(rows.astype(float), d.astype(float), g.astype(float), damping)
        told.append((float(info.relative_residual), actual))
    told, actual = np.asarray(told).T
    # Below the rounding of float32 a residual says nothing.
    within = lambda factor: (told < factor * actual + 1e-5) & (actual < factor * told + 1e-5)
    assert np.mean(within(10)) >= 0.9 and np.all(within(100))


@pytest.mark.parametrize("name", ["diagonal", "block_diagonal"])
def test_approximate_solvers_measure_no_residual(name):
    _, info = solve(ALL[name], np.float32(SHAPES["wide"]), np.float32(GRADIENT), 0.1)
    assert float(info.relative_residual) == -1


# The automatic choice.


def chosen(metric, params, batch) -> str:
    return automatic.choose(curvature(metric, params, batch, jax.random.key(0))).name


@pytest.mark.parametrize(
    ("columns", "rows", "expected"),
    [(4, 4, "cholesky"), (4, 9, "cholesky"), (5, 4, "woodbury"), (9, 6, "woodbury"), (9, 7, "cg")],
)
def test_the_choice_follows_parameters_and_rows(monkeypatch, columns, rows, expected):
    monkeypatch.setattr(automatic, "MAX_DENSE", 8)
    monkeypatch.setattr(automatic, "MAX_GRAM", 6)
    assert chosen(METRIC, jnp.zeros(columns), jnp.zeros((rows, columns))) == expected


def test_the_choice_counts_output_columns_or_samples_as_rows():
    params, batch = jnp.zeros((2, 3)), jnp.zeros((2, 2))
    linear = lambda w, x: x @ w
    assert chosen(ng.exact_fisher(linear, ng.Categorical()), params, batch) == "cholesky"
    assert chosen(ng.sampled_fisher(linear, ng.Categorical()), params, batch) == "woodbury"
    sampled = ng.sampled_fisher(linear, ng.Categorical(), num_samples=3)
    assert chosen(sampled, params, batch) == "cholesky"


def test_metrics_without_rows_are_dense_while_that_is_cheap(monkeypatch):
    metric = ng.hessian(lambda p, b: jnp.sum(p**2))
    assert chosen(metric, jnp.zeros(7), None) == "cholesky"
    monkeypatch.setattr(automatic, "MAX_DENSE", 6)
    assert chosen(metric, jnp.zeros(7), None) == "cg"
    assert chosen(ng.euclidean(), jnp.zeros(7), None) == "cg"


def test_the_limits_are_those_of_the_documentation():
    assert (automatic.MAX_DENSE, automatic.MAX_GRAM) == (2048, 4096)
    assert "2048" in ng.natural_gradient_direction.__doc__
    assert "4096" in ng.natural_gradient_direction.__doc__


def test_the_automatic_choice_keeps_no_state():
    assert jax.tree.leaves(automatic.AUTOMATIC.init(ng.euclidean(), jnp.zeros(3))) == []


# The edge of float32, and that the default is never the worst.

SHAPED = {"wide": (12, 30), "tall": (30, 12)}


def system(shape, decades, size=1.0):
    """Float32 rows whose eigenvalues spread over so many decades, and g of residuals of order 1."""
    random = np.random.default_rng(23)
    m, p = SHAPED[shape]
    left, right = (np.linalg.qr(random.normal(size=(n, 12)))[0] for n in (m, p))
    rows = np.float32((left * np.logspace(0, -decades / 2, 12)) @ right.T * size**0.5)
    return rows, rows.T @ np.float32(random.normal(size=m))


def exactly(rows, g, damping):
    return damped_inverse(rows, damping) @ g.astype(np.float64)


@pytest.mark.parametrize("shape", SHAPED)
@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
def test_the_default_is_as_good_as_the_best_at_every_damping_in_float32(shape, damping):
    rows, g = system(shape, decades=12)
    expected = exactly(rows, g, damping)
    errors = {name: error(solve(EXACT[name], rows, g, damping)[0], expected) for name in EXACT}
    best = min(value for name, value in errors.items() if name != "None")
    assert errors["None"] < 10 * best + 3e-4
    # The control: there is a worse choice to be made.
    assert damping > 1e-6 or errors["spectral"] > 10 * errors["None"]


@pytest.mark.parametrize("name", ["cholesky", "woodbury"])
@pytest.mark.parametrize("shape", SHAPED)
def test_a_direction_without_digits_is_told(name, shape):
    """Twelve decades of eigenvalues in float32: right, or with a residual that says not."""
    rows, g = system(shape, decades=12)
    for damping in (1e-3, 1e-5, 1e-7, 1e-9):
        d, info = solve(EXACT[name], rows, g, damping)
        right = error(d, exactly(rows, g, damping)) < 0.1
        assert right or float(info.relative_residual) > 1e-3


@exact_solvers
@pytest.mark.parametrize("shape", SHAPED)
def test_the_size_of_the_metric_does_not_matter(solver, shape):
    """F of 1e-30, its squares beyond float32, solved as F of 1 is."""
    rows, g = system(shape, decades=2)
    small, _ = system(shape, decades=2, size=1e-30)
    for damping in (1e-2, 0.0):
        d, _ = solve(solver, rows, g, damping)
        scaled, info = solve(solver, small, g, 1e-30 * damping)
        assert error(scaled.astype(np.float64) * 1e-30, d.astype(np.float64)) < 1e-3
        assert all(np.isfinite(leaf) for leaf in info)


@exact_solvers
@pytest.mark.parametrize("shape", SHAPED)
def test_damping_that_is_nothing_beside_the_metric_gives_no_nan(solver, shape):
    rows, g = system(shape, decades=12)
    for damping in (1e-20, 1e-30):
        d, info = solve(solver, rows, g, damping)
        assert np.isfinite(d).all()
        assert all(np.isfinite(leaf) for leaf in info)
