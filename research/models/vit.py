"""A vision transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.attention.algebra import Mask
from research.nn import checks, stack
from research.nn.attention import AttentionConfig
from research.nn.block import Block, BlockConfig
from research.nn.functional import Functional, Layer, functional, param
from research.nn.linear import Linear
from research.nn.masks import layered
from research.nn.norms import NORMS


class ViT(Layer):
    """float32 [batch, height, width, channels] -> [batch, outputs] (Dosovitskiy et al. 2020, arXiv 2010.11929), with the mean
    over patches in place of a class token (Beyer et al. 2022, arXiv 2205.01580)."""

    def __init__(self, block: BlockConfig, shape: Sequence[int], outputs: int, patch: int, layers: int, period: int,
                 masks: tuple[Mask, ...], scan: bool, remat: tuple[str, ...], rngs: nnx.Rngs):  # fmt: skip
        width, dtype = block.attention.width, block.attention.dtype
        height, across, channels = shape
        self.patch, self.scan, self.remat = patch, scan, remat
        self.embed = Linear(patch * patch * channels, width, (None, "embed"), bias=True, dtype=dtype, rngs=rngs)
        count = height // patch * (across // patch)
        self.position = param(jax.random.normal(rngs.params(), (count, width)) * 0.02, None, "embed")
        self.blocks = stack.build(lambda i, r: Block(block, masks[i % len(masks)], r), layers, period, scan, rngs)
        self.norm = NORMS[block.norm](width, rngs=rngs)
        self.head = Linear(width, outputs, ("embed", None), bias=True, dtype=dtype, init=block.attention.out_init, rngs=rngs)

    def hidden(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """What the output layer reads: float32 [batch, width]."""
        b, h, w, c = x_BxHxWxC.shape
        p = self.patch
        patches = x_BxHxWxC.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3).reshape(b, -1, p * p * c)
        x = self.embed(patches) + self.position[...][None]
        x, _ = stack.run(self.blocks, lambda block, x, _: (block(x), None), x, scan=self.scan, remat=self.remat)
        return jnp.mean(self.norm(x), axis=1)

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        return self.head(self.hidden(x_BxHxWxC))


def vit(
    *,
    shape: Sequence[int],
    outputs: int,
    patch: int,
    width: int,
    layers: int,
    heads: int,
    attention: Mapping[str, Any],
    qk_norm: float,
    mlp: str,
    mlp_width: int,
    norm: str,
    dropout: float,
    zero_init: bool,
    dtype: str,
    scan_layers: bool,
    remat: Sequence[str],
) -> Functional:
    """A vision transformer, float32 [batch, *shape] -> [batch, outputs]; shape: (height, width, channels), in patch x patch
    squares.

    Blocks as in `transformer`, and learned positions. attention: masks as there, over patches row by row, and none of them made
    causal; ["full()"] lets all see all. Raises ValueError, naming the config's key, for sizes that cannot work.
    """
    if len(shape) != 3:
        raise ValueError(f"vit reads inputs of shape [height, width, channels], not {list(shape)}")
    for size in shape[:2]:
        checks.divisible("each side of the image", size, "model.patch", patch)
    checks.positive("model.outputs", outputs)
    checks.positive("model.layers", layers)
    checks.divisible("model.width", width, "model.heads", heads)
    out_init = "zeros" if zero_init else "normal"
    masks, implementation = layered(attention, layers, heads, causal=False)
    period = stack.pattern(layers, len(masks), remat)
    attending = AttentionConfig(width, heads, heads, width // heads, 0.0, qk_norm, out_init, dtype, implementation)
    block = BlockConfig(attending, mlp, mlp_width, norm, 0, dropout)
    block.check()
    return functional(
        lambda rngs: ViT(block, tuple(shape), outputs, patch, layers, period, masks, scan_layers, tuple(remat), rngs)
    )
