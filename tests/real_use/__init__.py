"""Real models, real data, and the libraries that people use beside optax."""
