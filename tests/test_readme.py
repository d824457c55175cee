"""The README's example is run as it stands."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import natgrad_jax as ng

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.smoke
def test_the_chain_example_of_the_readme_lowers_the_loss():
    chain, kfac, control = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(compile(chain, "README.md", "exec"), names)
    start = jax.tree.map(lambda p: 0 * p, names["params"])
    before = names["loss"](start, names["batch"])
    after = names["loss"](names["params"], names["batch"])
    # A model of zeros gives the log of the number of classes.
    assert abs(float(before) - 1.0986) < 1e-3
    assert float(after) < 0.8 * float(before)
    # The next one takes up the same names.
    names["params"] = start
    exec(compile(kfac, "README.md", "exec"), names)
    moved = jax.tree.map(jnp.add, start, names["updates"])
    assert float(names["loss"](moved, names["batch"])) < 0.95 * float(before)
    names["params"] = start
    exec(compile(control, "README.md", "exec"), names)
    assert float(names["loss"](names["params"], names["batch"])) < 0.8 * float(before)
    assert float(names["state"].info.decrease) > 0


def test_the_table_of_explain_is_what_it_prints():
    def model(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]

    params = {"b": jnp.zeros(8), "v": jnp.zeros((8, 10)), "w": jnp.zeros((64, 8))}
    report = ng.explain(ng.sampled_fisher(model, ng.Categorical()), params, jnp.zeros((32, 64)))
    shown = [line.strip() for line in README.splitlines()]
    assert all(line.strip() in shown for line in str(report).splitlines())
