"""MNIST-1D: ten hand-drawn 1-D digits, padded, moved, scaled, sheared and covered with noise. Made here, nothing is downloaded.

Source: S. Greydanus and D. Kobak, "Scaling Down Deep Learning with MNIST-1D" (arXiv 2011.14439), section 2, and the generator
published with it, whose random draws are followed one by one: the arrays are those of `mnist1d.data.make_dataset`, bit for bit
(a test compares them where that package is installed).
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.ndimage import gaussian_filter1d

from research.data.arrays import array_source
from research.data.streams import Source

# Heights of the pen at 12 equally spaced moments, one row a digit.
TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
PADDING = (36, 60)  # zeros after the template, both ends included
CANVAS = len(TEMPLATES[0]) + PADDING[1]
SCALE, SHEAR = 0.4, 0.75  # widths of the uniform draws
TRANSLATION = 48
CORRELATED_NOISE, NOISE = 0.25, 0.02
BLUR = 2  # standard deviation, in samples, of the filter that correlates the noise
LENGTH = 40
MAX_SEED = 2**32 - 1
RAMP = np.linspace(-0.5, 0.5, CANVAS)


def _templates() -> np.ndarray:
    """float64 [10, 12]: each of mean 0 and deviation 1, then begun at 0, divided by 6."""
    x = np.asarray(TEMPLATES, np.float64)
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    return (x - x[:, :1]) / 6


@functools.cache
def _grid(length: int) -> np.ndarray:
    return np.linspace(0, 1, length)


def _resampled(x: np.ndarray, length: int) -> np.ndarray:
    return np.interp(_grid(length), _grid(len(x)), x)


def _drawn(template: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """One example, float64 [LENGTH]. The order of the draws is part of the data set."""
    low, high = PADDING
    zeros = np.zeros(low + int(random.rand() * (high - low + 1)))
    x = _resampled(np.concatenate([template + 1e-8, zeros]), CANVAS)  # 1e-8 tells a pen at 0 from no pen
    x = x * (1 + SCALE * (random.rand() - 0.5))
    x = np.roll(x, random.randint(TRANSLATION))
    pen = x != 0
    x = pen * x + (1 - pen) * gaussian_filter1d(CORRELATED_NOISE * random.randn(CANVAS), BLUR)
    x = x + NOISE * random.randn(CANVAS)
    x = x - SHEAR * (random.rand() - 0.5) * RAMP
    return _resampled(x, LENGTH)


def mnist1d(
    *, samples: int = 5000, train: float = 0.8, shuffled: bool = False, label_noise: float = 0.0, seed: int = 42
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train": (x float32 [4000, 40], y int32 [4000]), "test": (x [1000, 40], y [1000])}.

    Args:
      samples: in all; rounded down to a multiple of the ten classes.
      train: their fraction to train on.
      shuffled: permute the 40 places, the same way everywhere: what is local is lost.
      label_noise: the probability with which a training label is replaced by one of the ten, its own among them.
      seed: of the generator; the published data set is 42.

    Raises ValueError where a part would be empty, for a probability that is none, or a seed that the generator does not take.
    """
    if not 0 <= label_noise <= 1:
        raise ValueError(f"data.label_noise={label_noise} must be 0 to 1")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"data.seed={seed} must be 0 to {MAX_SEED}")
    each = samples // 10
    cut = int(each * 10 * train)
    if not 0 < cut < each * 10:
        raise ValueError(f"mnist1d: given {samples} samples and train {train}, which trains on {cut} of {each * 10}")
    random = np.random.RandomState(seed)  # the generator of the published data, of a stream that NumPy keeps for ever
    x = np.stack([_drawn(template, random) for template in _templates() for _ in range(each)])
    y = np.repeat(np.arange(10, dtype=np.int32), each)
    order = random.permutation(len(y))
    x, y = x[order], y[order]
    if shuffled:
        x = x[:, random.permutation(LENGTH)]
    x = ((x - x.mean()) / x.std()).astype(np.float32)
    if label_noise:  # drawn last, so that the examples are those without it
        noisy = random.rand(cut) < label_noise
        y[:cut] = np.where(noisy, random.randint(0, 10, cut), y[:cut])
    return {"train": (x[:cut], y[:cut]), "test": (x[cut:], y[cut:])}


def mnist1d_sources(
    *, samples: int = 5000, train: float = 0.8, shuffled: bool = False, label_noise: float = 0.0, seed: int = 42
) -> dict[str, Source]:
    """{"train", "test"}: Sources of {"inputs": float32 [40], "targets": int32 []}, by default of the published sizes."""
    parts = mnist1d(samples=samples, train=train, shuffled=shuffled, label_noise=label_noise, seed=seed)
    return {part: array_source({"inputs": x, "targets": y}) for part, (x, y) in parts.items()}
