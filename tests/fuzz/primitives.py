"""The differentiable primitives of the JAX at hand, and those that no model can reach."""

import importlib
import pathlib
import subprocess
import sys

from jax.interpreters import ad

# Rules of these are registered where the module is first imported.
MODULES = ["jax.lax", "jax.lax.linalg", "jax.numpy.fft", "jax.numpy.linalg", "jax.nn"]

_COLLECTIVE = "speaks between devices, and means nothing outside `shard_map`"
_TYPES = "is a cast between shardings of a mesh with explicit axes"
_BOX = "belongs to an unfinished kind of reference that no public module makes"
_REFUSED = "is refused by JAX itself wherever its operand has a derivative"
_EXTENDED = "changes how JAX stores an array whose elements are no numbers"
_KERNEL = "belongs to kernels written for one kind of accelerator"
_LOWERING = "is written by JAX below the jaxpr, after every derivative"

#: Primitives with a derivative that need no case, each with the reason.
EXEMPT = {
    "all_gather": _COLLECTIVE,
    "all_gather_invariant": _COLLECTIVE,
    "all_gather_reduced": _COLLECTIVE,
    "all_to_all": _COLLECTIVE,
    "pbroadcast": _COLLECTIVE,
    "pbroadcast_dynamic": _COLLECTIVE,
    "ppermute": _COLLECTIVE,
    "psum": _COLLECTIVE,
    "psum_invariant": _COLLECTIVE,
    "ragged_all_to_all": _COLLECTIVE,
    "reduce_scatter": _COLLECTIVE,
    "unreduced_psum": _COLLECTIVE,
    "unreduced_reduce_scatter": _COLLECTIVE,
    "preduced": _TYPES,
    "pvary": _TYPES,
    "reduced_vary_cast": _TYPES,
    "reduced_vary_cast_p": _TYPES,
    "reshard": _TYPES,
    "vary_unreduced_cast": _TYPES,
    "vary_unreduced_cast_p": _TYPES,
    "box_get": _BOX,
    "box_set": _BOX,
    "new_box": _BOX,
    "new_log": _BOX,
    "log_extend": _BOX,
    "log_read": _BOX,
    "ffi_call": _REFUSED,
    "from_edtype": _EXTENDED,
    "to_edtype": _EXTENDED,
    "eq_to": _LOWERING,
    "le_to": _LOWERING,
    "lt_to": _LOWERING,
    "relayout": _KERNEL,
    "run_state": _KERNEL,
    "with_memory_space_constraint": _KERNEL,
    "accum_grad_in_ref": "stands only in a backward pass that JAX runs and never shows",
    "call_hi_primitive": "is a primitive of the user's own, with rules of its own",
    "dce_sink": "keeps a value alive and returns nothing",
    "eval_jaxpr": "calls a program that was staged out by hand",
    "stage": "makes an array of a constant, and leaves no equation",
    "tie": "orders two values, and no public function makes it",
}


def differentiable() -> set[str]:
    """The names of all primitives with a rule of forward mode."""
    for module in MODULES:
        importlib.import_module(module)
    return {primitive.name for primitive in ad.primitive_jvps}


def of_a_fresh_process() -> set[str]:
    """The same, free of what other libraries and other tests have registered."""
    program = "from tests.fuzz.primitives import differentiable; print(*differentiable())"
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return set(printed.split())


def without_case(names: set[str], cases: set[str]) -> list[str]:
    """Names that have neither a case nor a reason to have none."""
    return sorted(names - cases - set(EXEMPT))
