"""Intervals over repeated runs."""

from __future__ import annotations

import numpy as np

# Student's t, 97.5% quantile, by degrees of freedom 1 to 30; beyond, the normal's.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_interval(values: np.ndarray) -> float:
    """Half the width of the 95% interval of the mean of `values` [n]; NaN for n = 1."""
    n = len(values)
    if n < 2:
        return float("nan")
    quantile = _T[n - 2] if n - 2 < len(_T) else 1.960
    return float(quantile * values.std(ddof=1) / n**0.5)
