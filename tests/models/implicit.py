"""Models whose backward pass is their own, and iterates: no forward mode, no transpose."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.ode import odeint

from tests.models import exact


def iterated(step, z):
    """The fixed point of a contraction."""
    far = lambda carry: (carry[0] < 300) & (jnp.max(jnp.abs(carry[1] - carry[2])) > 1e-14)
    forward = lambda carry: (carry[0] + 1, step(carry[1]), carry[1])
    return lax.while_loop(far, forward, (0, step(z), z))[1]


@jax.custom_vjp
def fixed_point(w, u, x):
    """z = tanh(z w + x u)."""
    return iterated(lambda z: jnp.tanh(z @ w + x @ u), jnp.zeros((*x.shape[:-1], w.shape[0])))


def _forward(w, u, x):
    z = fixed_point(w, u, x)
    return z, (w, u, x, z)


def _backward(saved, g):
    w, u, x, z = saved
    slope = 1 - z**2
    a = slope * iterated(lambda a: g + (slope * a) @ w.T, g)
    return jnp.einsum("...i,...j->ij", z, a), jnp.einsum("...i,...j->ij", x, a), a @ u.T


fixed_point.defvjp(_forward, _backward)


def equilibrium(p, x):
    return fixed_point(p["w"], p["u"], x) @ p["v"]


def equilibrium_of_each(p, x):
    return jax.vmap(lambda x: fixed_point(p["w"], p["u"], x) @ p["v"])(x)


def flow(y, t, w):
    return jnp.tanh(y @ w) + t


def ode(p, x):
    times = jnp.array([0.0, 0.5])
    start = x @ p["u"]
    return odeint(flow, start, times, p["w"], rtol=1e-9, atol=1e-9)[-1] @ p["v"]


def ode_of_each(p, x):
    return jax.vmap(lambda x: ode(p, x))(x)


def diffrax_ode(p, x):
    """Its default adjoint has no forward mode."""
    diffrax = pytest.importorskip("diffrax")
    term = diffrax.ODETerm(lambda t, y, w: flow(y, t, w))
    method = diffrax.Heun()
    solution = diffrax.diffeqsolve(
        term, method, 0.0, 0.5, 0.25, x @ p["u"], args=p["w"], max_steps=16
    )
    return solution.ys[-1] @ p["v"]


def diffrax_ode_of_each(p, x):
    return jax.vmap(lambda x: diffrax_ode(p, x))(x)


#: One of each kind.
KINDS = [equilibrium, ode, diffrax_ode]
MODELS = [*KINDS, equilibrium_of_each, ode_of_each, diffrax_ode_of_each]
#: The backward pass of `odeint` chooses its own steps for every cotangent.
RTOL = {ode: 1e-5, ode_of_each: 1e-5}


def arguments(size=5):
    """Parameters, weights small enough for a contraction, and a batch."""
    p = exact.normals(0, u=(2, 3), v=(3, 2), w=(3, 3))
    return p | {"w": 0.2 * p["w"]}, exact.normals(1, x=(size, 2))["x"]
