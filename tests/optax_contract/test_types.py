"""P1, P4, P6, P8, P11, P13, P14, P20: keywords, dtypes and states."""

import jax
import jax.numpy as jnp
import optax
import pytest

from . import cases
from . import checks
from . import oracle

ALL = pytest.mark.parametrize("name", cases.CASES)
DTYPES = ["bfloat16", "float16", "float32", "float64"]


@ALL
@pytest.mark.parametrize("check", checks.CHECKS)
def test_contract(name, check, x64):
    checks.CHECKS[check](cases.transformation(name), *cases.arrays())


@ALL
def test_map_params_finds_the_trees_like_the_parameters(name, x64):
    case = cases.CASES[name]
    checks.maps_params(cases.transformation(name), case.params_like, *cases.arrays())


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_are_kept(name, dtype, x64):
    checks.keeps_types(cases.transformation(name), *cases.arrays(dtype))


@ALL
def test_a_mixed_tree_keeps_the_dtype_of_every_leaf(name, x64):
    params, grads, batch = cases.arrays()
    mixed = lambda tree: {"b": tree["b"].astype(jnp.float64), "w": tree["w"].astype(jnp.float32)}
    checks.keeps_types(cases.transformation(name), mixed(params), mixed(grads), batch)


@pytest.mark.parametrize("name", cases.CASES)
def test_updates_keep_the_dtype_of_gradients_unlike_the_parameters(name, standard_promotion):
    # optax's own weight decay adds parameters to gradients: that needs promotion.
    params, _, batch = cases.arrays("float32")
    _, grads, _ = cases.arrays("bfloat16")
    checks.keeps_types(cases.transformation(name), params, grads, batch)


@pytest.mark.parametrize("name", cases.CASES)
def test_unknown_keywords_pass_through_jit(name, x64):
    params, grads, batch = cases.arrays()
    tx = cases.transformation(name)
    jitted = jax.jit(tx.update).trace(
        grads, tx.init(params), params, batch=batch, unknown=jnp.ones(3), another=1.0
    )
    assert checks.types(jitted.out_info) == checks.types((grads, tx.init(params)))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_steps_in_narrow_dtypes_are_the_wide_ones_rounded(dtype):
    """Types alone would not tell whether linear algebra runs wide inside."""
    params, grads, batch = cases.arrays(dtype)
    tx = cases.transformation("scale_by_natural_gradient-automatic")
    updates, _ = tx.update(grads, tx.init(params), params, batch=batch)
    fisher = oracle.matrix("exact_fisher", params, batch)
    expected = oracle.solve(fisher, cases.DAMPING, oracle.ravel(grads))
    # The model itself runs in the narrow dtype: F is known to a few of its eps, which the solve
    # magnifies by the condition number.
    amplification = oracle.amplification(fisher, cases.DAMPING, 0, 1)
    oracle.close(updates, expected, float(jnp.finfo(dtype).eps) / 100, 2 * amplification)


def test_checks_meet_what_they_are_for(x64):
    """The control: broken transformations fail the same checks."""
    params, grads, batch = cases.arrays("bfloat16")

    def broken(update, init=lambda params: jnp.zeros((), jnp.int32)):
        return optax.GradientTransformationExtraArgs(init, update)

    promoting = broken(
        lambda g, s, p=None, **extra: (jax.tree.map(lambda x: x.astype("float32"), g), s)
    )
    strict = broken(lambda g, s, p=None, *, batch: (g, s))
    weak = broken(lambda g, s, p=None, **extra: (g, s), lambda params: jnp.asarray(1.0))
    unstable = weak._replace(update=lambda g, s, p=None, **extra: (g, s + jnp.ones((), s.dtype)))
    wide = broken(lambda g, s, p=None, **extra: (g, s.astype(jnp.int64)))
    by_type = broken(
        lambda g, s, p=None, **extra: (
            g,
            s if isinstance(s, jax.core.Tracer) else s.astype("int64"),
        )
    )
    touching = broken(lambda g, s, p=None, **extra: (g, s), lambda p: p["w"] + p["w"])
    telling = broken(lambda g, s, p=None, **extra: (g, s), lambda p: {"value": jnp.zeros(())})
    for check, tx, error in [
        (checks.keeps_types, promoting, AssertionError),
        (checks.accepts_unknown_keywords, strict, TypeError),
        (checks.keeps_types, unstable, AssertionError),
        (checks.keeps_types, wide, AssertionError),
        (checks.can_be_skipped, wide, TypeError),
        (checks.same_types_compiled, by_type, AssertionError),
        (checks.starts_from_shapes, touching, TypeError),
        (checks.no_field_of_the_objective, telling, AssertionError),
    ]:
        with pytest.raises(error):
            check(tx, params, grads, batch)


def test_map_params_check_meets_a_first_leaf_and_a_missing_tree(x64):
    params, grads, batch = cases.arrays()
    first_leaf = optax.GradientTransformationExtraArgs(
        lambda p: jnp.zeros(jax.tree.leaves(p)[0].shape), lambda g, s, p=None, **extra: (g, s)
    )
    with pytest.raises(IndexError):
        checks.maps_params(first_leaf, (), params, grads, batch)
    with pytest.raises(AssertionError):
        checks.maps_params(
            optax.with_extra_args_support(optax.scale_by_rms()), (), params, grads, batch
        )
