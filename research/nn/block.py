"""A pre-norm transformer block."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from pallas_kernels.attention.algebra import Mask
from research.core.mesh import constrained
from research.core.names import choose
from research.nn import checks
from research.nn.attention import Attention, AttentionConfig
from research.nn.conv import ShortConv
from research.nn.functional import Layer
from research.nn.mlp import MLPS, feed_forward
from research.nn.norms import NORMS


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A block around an attention layer. mlp: one of MLPS, of hidden width mlp_width. norm: one of NORMS. conv: taps of a short
    causal convolution of the attention's input, 0 for none. dropout: rate on both residual branches."""

    attention: AttentionConfig
    mlp: str
    mlp_width: int
    norm: str
    conv: int
    dropout: float

    def check(self) -> None:
        """Raises ValueError, naming the config's key, for what cannot be built."""
        self.attention.check()
        choose(dict.fromkeys(MLPS), self.mlp, "model.mlp")
        choose(NORMS, self.norm, "model.norm")
        checks.positive("model.mlp_width", self.mlp_width)
        checks.fraction("model.dropout", self.dropout)
        if self.conv < 0:
            raise ValueError(f"model.conv={self.conv} must be 0 (none) or the number of taps")


class Block(Layer):
    """x + attention(norm(x)), then + mlp(norm(.)): [batch, length, width] -> the same."""

    def __init__(self, config: BlockConfig, mask: Mask, rngs: nnx.Rngs):
        width, out_init, dtype = config.attention.width, config.attention.out_init, config.attention.dtype
        norm = NORMS[config.norm]
        self.attention_norm = norm(width, rngs=rngs)
        self.conv = ShortConv(width, config.conv, rngs=rngs) if config.conv else None
        self.attention = Attention(config.attention, mask, rngs)
        self.mlp_norm = norm(width, rngs=rngs)
        self.mlp = feed_forward(config.mlp, width, config.mlp_width, dtype=dtype, out_init=out_init, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def _dropped(self, x: jax.Array) -> jax.Array:
        return x if self.dropout is None else self.dropout(x)

    def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
        y = self.attention_norm(x_BxTxC)
        y = y if self.conv is None else self.conv(y)
        x = x_BxTxC + self._dropped(self.attention(y))
        x = x + self._dropped(self.mlp(self.mlp_norm(x)))
        return constrained(x, "batch", "length", "embed")

    def cache_specs(self, batch: int, context: int) -> dict[str, Any]:
        cache: dict[str, Any] = {"attention": self.attention.cache_specs(batch, context)}
        return cache if self.conv is None else cache | {"conv": self.conv.cache_specs(batch)}

    def decode(self, x_BxTxC: jax.Array, cache: dict[str, Any], index: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Positions index .. index + T - 1 given those before; (output, cache)."""
        new = {}
        y = self.attention_norm(x_BxTxC)
        if self.conv is not None:
            y, new["conv"] = self.conv.decode(y, cache["conv"])
        y, new["attention"] = self.attention.decode(y, cache["attention"], index)
        x = x_BxTxC + y
        return x + self.mlp(self.mlp_norm(x)), new
