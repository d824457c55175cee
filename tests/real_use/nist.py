"""NIST's statistical reference problems of nonlinear regression: data, starts, certified values.

Public domain: National Institute of Standards and Technology, Statistical Reference Datasets,
https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml. Those that are few enough to state, with
the ones that are hard (MGH10, MGH17) or have parameters in very different units.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: y = f(b, x), under NIST's names.
Model = Callable[[Any, Any], Any]


class Problem(NamedTuple):
    """One regression.

    Attributes:
      model: (b, x) -> y.
      x: (N,) or (N, 2).
      y: (N,).
      starts: (2, P), far from and near the answer.
      parameters: certified, (P,).
      errors: certified standard errors, (P,).
    """

    model: Model
    x: np.ndarray
    y: np.ndarray
    starts: np.ndarray
    parameters: np.ndarray
    errors: np.ndarray

    def residual(self, b: jax.Array, batch: tuple[Any, Any]) -> jax.Array:
        """f(b, x) - y for a batch (x, y)."""
        return self.model(b, batch[0]) - batch[1]

    @property
    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """The data as a metric takes them."""
        return self.x, self.y


def digits(found: Any, certified: np.ndarray) -> float:
    """Right digits of the worst one: -log10 of the largest relative error, 11 at most."""
    found = np.asarray(found, float)
    if not np.all(np.isfinite(found)):
        return 0.0
    error = np.max(np.abs(found - certified) / np.abs(certified))
    return float(np.clip(-np.log10(max(error, 1e-11)), 0, 11))


def _gauss(b: Any, x: Any) -> Any:
    peaks = (b[2 + i] * jnp.exp(-(((x - b[3 + i]) / b[4 + i]) ** 2)) for i in (0, 3))
    return b[0] * jnp.exp(-b[1] * x) + sum(peaks)


def _exponentials(b: Any, x: Any) -> Any:
    return sum(b[i] * jnp.exp(-b[i + 1] * x) for i in (0, 2, 4))


def _cubics(b: Any, x: Any) -> Any:
    top = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    return top / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def _enso(b: Any, x: Any) -> Any:
    wave = lambda c, s, period: (
        c * jnp.cos(2 * np.pi * x / period) + s * jnp.sin(2 * np.pi * x / period)
    )
    return b[0] + wave(b[1], b[2], 12.0) + wave(b[4], b[5], b[3]) + wave(b[7], b[8], b[6])


def _chwirut(b: Any, x: Any) -> Any:
    return jnp.exp(-b[0] * x) / (b[1] + b[2] * x)


MODELS: dict[str, Model] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": lambda b, x: b[0] * (1 - jnp.exp(-b[1] * x)),
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": _enso,
    "Eckerle4": lambda b, x: (b[0] / b[1]) * jnp.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "Hahn1": _cubics,
    "Kirby2": lambda b, x: (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2),
    "Lanczos1": _exponentials,
    "Lanczos2": _exponentials,
    "Lanczos3": _exponentials,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * jnp.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4]),
    "Misra1a": lambda b, x: b[0] * (1 - jnp.exp(-b[1] * x)),
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[:, 0] * jnp.exp(-b[2] * x[:, 1]),  # of log y
    "Rat42": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - jnp.arctan(b[2] / (x - b[3])) / np.pi,
    "Thurber": _cubics,
}


def read(path: Path) -> Problem:
    """A file in NIST's format: starts and certified values in lines 41 to 58, data from line 61."""
    lines = path.read_text().splitlines()
    rows = [line.split("=")[1].split() for line in lines[40:58] if line.strip().startswith("b")]
    table = np.array(rows, float)
    data = np.array([line.split() for line in lines[60:] if line.strip()], float)
    x = data[:, 1] if data.shape[1] == 2 else data[:, 1:]
    y = np.log(data[:, 0]) if path.stem == "Nelson" else data[:, 0]
    return Problem(MODELS[path.stem], x, y, table[:, :2].T, table[:, 2], table[:, 3])


def _problem(name: str, x: str, y: str, table: str) -> Problem:
    """`table` has a row for each parameter: both starts, certified value and standard error."""
    columns = np.array([row.split() for row in table.strip().splitlines()], float)
    data = [np.array(text.split(), float) for text in (x, y)]
    return Problem(MODELS[name], *data, columns[:, :2].T, columns[:, 2], columns[:, 3])


PROBLEMS: dict[str, Problem] = {
    "BoxBOD": _problem(
        "BoxBOD",
        """
            1 2 3 5 7 10
        """,
        """
            109 149 149 191 213 224
        """,
        """
            1 100 213.80940889 12.354515176
            1 0.75 0.54723748542 0.10455993237
        """,
    ),
    "Misra1a": _problem(
        "Misra1a",
        """
            77.6 114.9 141.1 190.8 239.9 289 332.8 378.4 434.8 477.3 536.8 593.1 689.1
            760
        """,
        """
            10.07 14.73 17.94 23.93 29.61 35.18 40.02 44.82 50.76 55.05 61.01 66.4 75.47
            81.78
        """,
        """
            500 250 238.94212918 2.7070075241
            0.0001 0.0005 0.00055015643181 7.2668688436e-06
        """,
    ),
    "MGH09": _problem(
        "MGH09",
        """
            4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625
        """,
        """
            0.1957 0.1947 0.1735 0.16 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246
        """,
        """
            25 0.25 0.19280693458 0.011435312227
            39 0.39 0.19128232873 0.19633220911
            41.5 0.415 0.12305650693 0.080842031232
            39 0.39 0.13606233068 0.090025542308
        """,
    ),
    "MGH10": _problem(
        "MGH10",
        """
            50 55 60 65 70 75 80 85 90 95 100 105 110 115 120 125
        """,
        """
            34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820
            3307 2872
        """,
        """
            2 0.02 0.005609636471 0.00015687892471
            400000 4000 6181.3463463 23.309021107
            25000 250 345.22363462 0.78486103508
        """,
    ),
    "MGH17": _problem(
        "MGH17",
        """
            0 10 20 30 40 50 60 70 80 90 100 110 120 130 140 150 160 170 180 190 200 210
            220 230 240 250 260 270 280 290 300 310 320
        """,
        """
            0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.85 0.818 0.784 0.751 0.718 0.685
            0.658 0.628 0.603 0.58 0.558 0.538 0.522 0.506 0.49 0.478 0.467 0.457 0.448
            0.438 0.431 0.424 0.42 0.414 0.411 0.406
        """,
        """
            50 0.5 0.37541005211 0.0020723153551
            150 1.5 1.9358469127 0.22031669222
            -100 -1 -1.4646871366 0.22175707739
            1 0.01 0.01286753464 0.00044861358114
            2 0.02 0.022122699662 0.00089471996575
        """,
    ),
    "Rat42": _problem(
        "Rat42",
        """
            9 14 21 28 42 57 63 70 79
        """,
        """
            8.93 10.8 18.59 22.33 39.35 56.11 61.73 64.62 67.08
        """,
        """
            100 75 72.462237576 1.7340283401
            1 2.5 2.6180768402 0.088295217536
            0.1 0.07 0.067359200066 0.0034465663377
        """,
    ),
    "Rat43": _problem(
        "Rat43",
        """
            1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
        """,
        """
            16.08 33.83 65.8 97.2 191.55 326.2 386.87 520.53 590.03 651.92 724.93 699.56
            689.96 637.56 717.41
        """,
        """
            100 700 699.6415127 16.302297817
            10 5 5.2771253025 2.0828735829
            1 0.75 0.75962938329 0.19566123451
            1 1.3 1.2792483859 0.68761936385
        """,
    ),
    "Lanczos3": _problem(
        "Lanczos3",
        """
            0 0.05 0.1 0.15 0.2 0.25 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 0.7 0.75 0.8
            0.85 0.9 0.95 1 1.05 1.1 1.15
        """,
        """
            2.5134 2.0443 1.6684 1.3664 1.1232 0.9269 0.7679 0.6389 0.5338 0.4479 0.3776
            0.3197 0.272 0.2325 0.1997 0.1723 0.1493 0.1301 0.1138 0.1 0.0883 0.0783
            0.0698 0.0624
        """,
        """
            1.2 0.5 0.086816414977 0.017197908859
            0.3 0.7 0.95498101505 0.097041624475
            5.6 3.6 0.84400777463 0.041488663282
            5.5 4.2 2.9515951832 0.10766312506
            6.5 4 1.5825685901 0.058371576281
            7.6 6.3 4.9863565084 0.034436403035
        """,
    ),
}
