"""Every public transformation, with every solver, held to what optax asks of a transformation."""
