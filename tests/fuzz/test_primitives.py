"""Every differentiable primitive of JAX, wherever a parameter may stand in it."""

import os

import jax
import jax.numpy as jnp
import pytest

from tests.fuzz import checks
from tests.fuzz import models
from tests.fuzz.cases import numbered
from tests.fuzz.cases import present
from tests.fuzz.primitives import EXEMPT
from tests.fuzz.primitives import differentiable
from tests.fuzz.primitives import of_a_fresh_process
from tests.fuzz.primitives import without_case

pytestmark = pytest.mark.usefixtures("standard_promotion")
ALL = int(os.environ.get("NATGRAD_FUZZ", "0")) > 0
CASES = numbered()


def _combinations(keep, every=1):
    """(case, position): one position of each case, another from case to case, or all of them."""
    chosen = []
    for i, (name, number, case) in enumerate(x for x in CASES if keep(x[2])):
        at = models.positions(case)
        if not ALL:
            at = [at[i % len(at)]] if i % every == 0 else []
        chosen += [pytest.param(case, p, id=f"{name}-{number}-{p}") for p in at]
    return chosen


def _built(case, position, dtype, **options):
    """The model of a case; skipped where JAX has no rows of it to compare with."""
    built = models.build(case, position, dtype, **options)
    said = case.refused and checks.refusal(*built[:3], case.refused)
    if said:
        pytest.skip(f"JAX itself: {said}")
    return built


def _agrees(case, position, dtype, rtol, record_property, **options):
    function, params, batch, other = _built(case, position, dtype, **options)
    mode = checks.check(function, params, batch, rtol * case.loose, other)
    record_property("mode", mode)


@pytest.mark.parametrize(("case", "position"), _combinations(lambda case: True))
def test_rows_of_a_primitive_are_those_of_reverse_mode(case, position, x64, record_property):
    _agrees(case, position, jnp.float64, 1e-10, record_property)


@pytest.mark.parametrize(("case", "position"), _combinations(lambda case: case.complex, every=2))
def test_rows_of_a_complex_primitive_are_those_of_reverse_mode(
    case, position, x64, record_property
):
    _agrees(case, position, jnp.float64, 1e-10, record_property, is_complex=True)


@pytest.mark.smoke
@pytest.mark.parametrize(("case", "position"), _combinations(lambda case: True, every=6))
def test_rows_of_a_primitive_in_float32(case, position, record_property):
    # A condition bounds the loss of digits. All of it would hide an error; half of it is enough.
    _agrees(case, position, jnp.float32, 3e-4 / case.loose**0.5, record_property)


@pytest.mark.parametrize(("case", "position"), _combinations(lambda case: True))
def test_a_mean_over_the_examples_is_found_behind_every_primitive(case, position):
    built = _built(case, position, jnp.float32, mixing=True)
    checks.mixing_is_found(built.function, built.params, built.batch)


ACROSS = [
    pytest.param(case, id=f"{name}-{i}") for name, i, case in CASES if models.works_across(case)
]
COMPLEX_ACROSS = [p for p in ACROSS if p.values[0].complex]


@pytest.mark.parametrize("case", ACROSS if ALL else ACROSS[::2])
def test_rows_where_a_primitive_works_along_the_examples(case, x64, record_property):
    _agrees(case, "across", jnp.float64, 1e-10, record_property)


@pytest.mark.parametrize("case", COMPLEX_ACROSS if ALL else COMPLEX_ACROSS[::8])
def test_rows_where_a_complex_primitive_works_along_the_examples(case, x64, record_property):
    _agrees(case, "across", jnp.float64, 1e-10, record_property, is_complex=True)


def _program(case, position, is_complex):
    built = models.build(case, position, jnp.float32, is_complex=is_complex)
    return checks.names(jax.make_jaxpr(built.function)(built.params, built.batch))


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=f"{n}-{i}") for n, i, c in CASES])
def test_a_case_contains_its_primitive(name, case):
    assert any(name in _program(case, p, False) for p in models.positions(case))


@pytest.mark.smoke
def test_the_table_covers_every_differentiable_primitive_of_this_jax():
    missing = without_case(of_a_fresh_process(), set(present()))
    assert not missing, f"no case in tests/fuzz/cases.py for: {', '.join(missing)}"


def test_a_primitive_without_a_case_is_reported():
    names = differentiable() | {"made_up"}
    assert "made_up" in without_case(names, set(present()))


def test_an_exempt_primitive_has_a_reason_and_no_case():
    assert all(EXEMPT.values())
    assert not set(EXEMPT) & set(present())


def test_a_wrong_row_is_found(monkeypatch):
    """The check has teeth: rows that are off by a thousandth are refused."""
    case = present()["sin"][0]
    built = models.build(case, "after", jnp.float32)
    right = checks.oracle.gauss_newton_rows
    monkeypatch.setattr(checks.oracle, "gauss_newton_rows", lambda *a: 1.001 * right(*a))
    with pytest.raises(AssertionError, match="product"):
        checks.check(*built[:3], 3e-4)
