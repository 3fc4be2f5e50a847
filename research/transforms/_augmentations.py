"""What `augment` does to batches: functions of (key, batch) that change batch["inputs"], each example in its own way.

Images are [batch, height, width, channels], of any dtype, which is kept. Everything is drawn at once, without loops.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core.types import Array, Batch, Key

Augmentation = Callable[[Key, Batch], Batch]


def on_inputs(fn: Callable[[Key, Array], Array]) -> Augmentation:
    """The augmentation that leaves all but batch["inputs"] as it is."""
    return lambda key, batch: {**batch, "inputs": fn(key, batch["inputs"])}


def chained(*augmentations: Augmentation) -> Augmentation:
    """One after another, each with a key of its own."""

    def fn(key: Key, batch: Batch) -> Batch:
        for i, augmentation in enumerate(augmentations):
            batch = augmentation(jax.random.fold_in(key, i), batch)
        return batch

    return fn


def _images(x: Array, who: str) -> tuple[int, ...]:
    if x.ndim != 4:
        raise ValueError(f"{who}: inputs {x.shape}; expected images [batch, height, width, channels]")
    return x.shape


def random_crop(padding: int) -> Augmentation:
    """Each image moved by a whole number of pixels from -padding to padding along each axis; what is left free is 0.

    Raises ValueError for padding below 1, or inputs that are no images.
    """
    if padding < 1:
        raise ValueError(f"random_crop: padding={padding}; allowed: 1 or more")

    def crop(key: Key, x_BxHxWxC: Array) -> Array:
        batch, *shape = _images(x_BxHxWxC, "random_crop")
        corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)
        padded = jnp.pad(x_BxHxWxC, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), shape))(padded, corners)

    return on_inputs(crop)


def _chosen(key: Key, x: Array, probability: float, changed: Array) -> Array:
    which = jax.random.bernoulli(key, probability, x.shape[:1])
    return jnp.where(which.reshape((-1,) + (1,) * (x.ndim - 1)), changed, x)


def horizontal_flip(probability: float = 0.5) -> Augmentation:
    """Each image mirrored left to right with this probability. Raises ValueError for one that is none, or inputs that are no
    images."""
    if not 0 <= probability <= 1:
        raise ValueError(f"horizontal_flip: probability={probability}; allowed: from 0 to 1")

    def flip(key: Key, x_BxHxWxC: Array) -> Array:
        _images(x_BxHxWxC, "horizontal_flip")
        return _chosen(key, x_BxHxWxC, probability, x_BxHxWxC[:, :, ::-1])

    return on_inputs(flip)


def cutout(size: int) -> Augmentation:
    """A square of size x size pixels around a random pixel of each image set to 0, cut at the edges (DeVries and Taylor 2017,
    arXiv 1708.04552). Raises ValueError for size below 1, or inputs that are no images."""
    if size < 1:
        raise ValueError(f"cutout: size={size}; allowed: 1 or more")

    def cut(key: Key, x_BxHxWxC: Array) -> Array:
        batch, height, width, _ = _images(x_BxHxWxC, "cutout")
        k_rows, k_columns = jax.random.split(key)

        def within(key: Key, length: int) -> Array:
            start = jax.random.randint(key, (batch, 1), 0, length) - size // 2
            place = jnp.arange(length)[None]
            return (place >= start) & (place < start + size)

        hole_BxHxW = within(k_rows, height)[:, :, None] & within(k_columns, width)[:, None, :]
        return jnp.where(hole_BxHxW[..., None], jnp.zeros((), x_BxHxWxC.dtype), x_BxHxWxC)

    return on_inputs(cut)


def added_noise(scale: float) -> Augmentation:
    """Inputs of any shape plus normal noise of this standard deviation. Raises ValueError for a negative one."""
    if scale < 0:
        raise ValueError(f"added_noise: scale={scale}; allowed: 0 or more")
    return on_inputs(lambda key, x: x + scale * jax.random.normal(key, x.shape, x.dtype))


def crop_and_flip(crop: int, flip: bool) -> Augmentation:
    """The usual two for small photographs: `random_crop(crop)`, none where 0, then `horizontal_flip()` where `flip`."""
    return chained(*([random_crop(crop)] if crop else []), *([horizontal_flip()] if flip else []))
