"""Real data for the examples: numpy arrays that ship inside scikit-learn."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def digits() -> dict[str, np.ndarray]:
    """100 handwritten digits: images (100, 8, 8, 1) in [0, 1], labels (100,)."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    return {
        "image": np.float32(data.images[:100, :, :, None] / 16),
        "label": np.int32(data.target[:100]),
    }
