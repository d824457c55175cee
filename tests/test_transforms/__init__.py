"""What each transformation computes; `optax_contract` has what optax asks of all of them."""
