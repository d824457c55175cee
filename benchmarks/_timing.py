"""Interleaved timing of compiled functions, and the models that the budgets speak of."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def interleaved(
    functions: dict[str, Callable[[], Any]], *, rounds: int = 7, seconds: float = 120.0
) -> dict[str, float]:
    """Median seconds of each function, run in turns so that a slow spell of the machine hits all.

    Every function is called once before, to compile.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - begin > seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def print_ratios(
    title: str, times: dict[str, float], unit: str, per: dict[str, float] | None = None
) -> None:
    """Prints every time and its ratio to `times[unit]`, each divided by its count in `per`."""
    print(f"{title}  ({jax.devices()[0].device_kind}, jax {jax.__version__})")
    for name, value in times.items():
        count = (per or {}).get(name, 1)
        print(f"  {name:<44} {1e3 * value / count:10.2f} ms   {value / count / times[unit]:8.2f} x")


def mlp(
    sizes: tuple[int, ...], key: jax.Array, dtype: Any = jnp.float32
) -> list[dict[str, jax.Array]]:
    """Parameters of a fully connected net, variance 1 / fan-in."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "w": jax.random.normal(k, (m, n), dtype) / jnp.sqrt(jnp.asarray(m, dtype)),
            "b": jnp.zeros((n,), dtype),
        }
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply_mlp(
    params: list[dict[str, jax.Array]], x: jax.Array, linear: tuple[int, ...] = ()
) -> jax.Array:
    """tanh after every layer but the last and those in `linear`."""
    for i, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        if i + 1 < len(params) and i not in linear:
            x = jnp.tanh(x)
    return x


def autoencoder(batch: int = 512) -> tuple[Tree, jax.Array, Callable[[Tree, jax.Array], jax.Array]]:
    """The deep autoencoder of the budgets: parameters (2.84 M), a batch of images, the model."""
    params = mlp(AUTOENCODER, jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (batch, AUTOENCODER[0]))
    return params, images, lambda p, x: apply_mlp(p, x, linear=(3,))
