"""The README's example is run as it stands."""

import pathlib
import re

import jax
import pytest


@pytest.mark.smoke
def test_the_chain_example_of_the_readme_lowers_the_loss():
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    start = jax.tree.map(lambda p: 0 * p, names["params"])
    before = names["loss"](start, names["batch"])
    after = names["loss"](names["params"], names["batch"])
    # A model of zeros gives the log of the number of classes.
    assert abs(float(before) - 1.0986) < 1e-3
    assert float(after) < 0.8 * float(before)
