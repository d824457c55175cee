"""Matrices of the tiny model by hand, in numpy and float64; leaves in tree order, b before w."""

import jax
import numpy as np
import scipy.linalg


def ravel(tree):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def close(actual, expected, eps, amplification=1.0):
    """Equal up to `amplification` times the rounding of sums over a few dozen terms."""
    actual, expected = (x if isinstance(x, np.ndarray) else ravel(x) for x in (actual, expected))
    atol = 100 * eps * amplification * np.max(np.abs(expected), initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def forward(params, batch):
    """Logits z, probabilities p, targets and Jacobians dz/dtheta (N, C, P)."""
    b, w, x = (np.asarray(a, np.float64) for a in (params["b"], params["w"], batch["x"]))
    t = np.tanh(x @ w)
    z = t + b
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    unit = np.eye(b.size)
    by_w = np.einsum("ni,nk,kj->nkij", x, 1 - t**2, unit).reshape(*z.shape, -1)
    jacobian = np.concatenate([np.broadcast_to(unit, (len(x), *unit.shape)), by_w], -1)
    return z, p, unit[np.asarray(batch["y"])], jacobian, t


def gradient(params, batch):
    """Of the mean negative log-likelihood."""
    _, p, y, jacobian, _ = forward(params, batch)
    return np.einsum("nk,nkp->p", p - y, jacobian) / len(p)


def rows(name, params, batch):
    """R of F = R^T R."""
    _, p, y, jacobian, _ = forward(params, batch)
    if name == "empirical_fisher":
        return np.einsum("nk,nkp->np", y - p, jacobian) / len(p) ** 0.5
    if name == "gauss_newton":
        return jacobian.reshape(-1, jacobian.shape[-1]) / len(p) ** 0.5
    # Categorical: M = diag(p) - p p^T = B B^T with B = diag(sqrt p) - p sqrt(p)^T.
    root = np.sqrt(p)
    factor = np.einsum("nk,kl->nkl", root, np.eye(p.shape[1])) - np.einsum("nk,nl->nkl", p, root)
    return (
        np.einsum("nkl,nkp->nlp", factor, jacobian).reshape(-1, jacobian.shape[-1]) / len(p) ** 0.5
    )


def matrix(name, params, batch):
    """F of a metric of the tiny model that does not sample."""
    if name == "euclidean":
        return np.eye(sum(np.size(x) for x in jax.tree.leaves(params)))
    if name != "hessian":
        r = rows(name, params, batch)
        return r.T @ r
    _, p, y, _, t = forward(params, batch)
    x, classes = np.asarray(batch["x"], np.float64), p.shape[1]
    second = (p - y) * (-2 * t * (1 - t**2)) / len(p)
    by_w = np.einsum("nk,ni,nj,kl->ikjl", second, x, x, np.eye(classes))
    size = classes * x.shape[1]
    curved = scipy.linalg.block_diag(np.zeros((classes, classes)), by_w.reshape(size, size))
    return matrix("exact_fisher", params, batch) + curved


def structured(fisher, structure, params):
    """The part of F that a solver works with."""
    if structure == "dense":
        return fisher
    if structure == "diagonal":
        return np.diag(np.diag(fisher))
    leaf = np.repeat(np.arange(2), [np.size(x) for x in jax.tree.leaves(params)])
    return np.where(leaf[:, None] == leaf[None], fisher, 0)


def solve(fisher, damping, g):
    """(F + damping I)^-1 g; damping 0 means the pseudo-inverse."""
    if damping == 0:
        return np.linalg.pinv(fisher, rcond=1e-10, hermitian=True) @ g
    return np.linalg.solve(fisher + damping * np.eye(len(g)), g)


def amplification(fisher, damping, tolerance, eps):
    """How a solve magnifies rounding: the condition number, times a residual in units of eps."""
    values = np.abs(np.linalg.eigvalsh(fisher + damping * np.eye(len(fisher))))
    kept = values[values > 1e-10 * values.max()]
    return kept.max() / kept.min() * max(1, tolerance / eps)
