"""Settings of every test: eight CPU devices, float32, and no implicit promotion of any kind."""

import contextlib
import os
from collections.abc import Iterator
from importlib.metadata import version

# The backend reads these once, when JAX first starts it. Compilation dominates, of code that runs
# once: without optimisation and with XLA's older emitters of fused loops it takes a quarter of the
# time. Doctests and notebooks run with XLA's defaults. Newer versions end at a flag that is gone.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_use_fusion_emitters=false"
        if [int(n) for n in version("jaxlib").split(".")[:2]] < [0, 11]
        else "",
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_llvm_disable_expensive_passes=true",
    ]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@contextlib.contextmanager
def _configured(**options: object) -> Iterator[None]:
    # `config.update` rather than a context manager: `jax.enable_x64` is missing from jax 0.7. All
    # of these options are part of the key of every jit cache, so that nothing leaks between modes.
    previous = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in previous.items():
            jax.config.update(name, value)


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with _configured(jax_enable_x64=True):
        yield


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """JAX's own defaults, for code of others: `optax.adam` and `optax.MultiSteps` need them."""
    with _configured(jax_numpy_dtype_promotion="standard", jax_numpy_rank_promotion="allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs() -> Iterator[None]:
    """Thousands of small programs would fill the memory of a worker."""
    yield
    jax.clear_caches()
