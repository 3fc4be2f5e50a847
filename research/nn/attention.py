"""Multi-head self-attention with its key-value cache."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.attention import sparse_attention
from pallas_kernels.attention.algebra import Mask
from research.core.names import choose
from research.core.types import Spec
from research.nn import checks, sharded_attention
from research.nn.attention_core import attend, visible
from research.nn.functional import Layer
from research.nn.linear import Linear
from research.nn.masks import reach
from research.nn.norms import RMSNorm
from research.nn.position import rotary_tables, rotate
from research.nn.products import DTYPES


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Sizes of an attention layer. heads: query heads, a multiple of kv_heads. rope_base: base of the rotary embedding's
    frequencies, 0 for none. qk_norm: RMS norm of each head's queries and keys (Dehghani et al. 2023, arXiv 2302.05442, section
    2). implementation: of `sparse_attention`, None for the best that supports the call."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    qk_norm: float
    out_init: str
    dtype: str
    implementation: str | None

    def check(self) -> None:
        """Raises ValueError, naming the config's key, for what cannot be built."""
        checks.divisible("model.heads", self.heads, "model.kv_heads", self.kv_heads)
        checks.positive("model.head_dim", self.head_dim)
        if self.rope_base and self.head_dim % 2:
            raise ValueError(
                f"model.head_dim={self.head_dim} is odd, and rotary embedding (model.rope_base={self.rope_base}) turns pairs; "
                f"nearest: {self.head_dim - 1} or {self.head_dim + 1}"
            )
        choose(DTYPES, self.dtype, "model.dtype")


@contextlib.contextmanager
def _named(implementation: str | None) -> Iterator[None]:
    """What a named implementation does not support is bad input: a ValueError that names the config's key."""
    try:
        yield
    except NotImplementedError as error:
        key = f"model.attention.implementation={implementation or ''!r}"
        raise ValueError(f"{key} does not support this: {error}; '' takes the best that does") from None


class Attention(Layer):
    """Self-attention, [batch, length, width] -> the same. mask: which positions see which; one that is to decode sees nothing
    that comes later."""

    def __init__(self, config: AttentionConfig, mask: Mask, rngs: nnx.Rngs):
        width, d, dtype = config.width, config.head_dim, config.dtype
        self.config, self.mask = config, mask
        self.query = Linear(width, config.heads * d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.key = Linear(width, config.kv_heads * d, ("embed", "kv_heads"), dtype=dtype, rngs=rngs)
        self.value = Linear(width, config.kv_heads * d, ("embed", "kv_heads"), dtype=dtype, rngs=rngs)
        self.out = Linear(config.heads * d, width, ("heads", "embed"), dtype=dtype, init=config.out_init, rngs=rngs)
        self.query_norm = RMSNorm(d, axis="head_dim", start=config.qk_norm, rngs=rngs) if config.qk_norm else None
        self.key_norm = RMSNorm(d, axis="head_dim", rngs=rngs) if config.qk_norm else None

    def _projected(self, x_BxTxC: jax.Array, start: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        b, t, _ = x_BxTxC.shape
        d, base = self.config.head_dim, self.config.rope_base
        q, k, v = (layer(x_BxTxC).reshape(b, t, -1, d) for layer in (self.query, self.key, self.value))
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if base:
            tables = rotary_tables(start, t, d, base)
            q, k = rotate(q, tables), rotate(k, tables)
        return q, k, v

    def _merged(self, heads_BxTxHxD: jax.Array) -> jax.Array:
        return self.out(heads_BxTxHxD.reshape(*heads_BxTxHxD.shape[:2], -1))

    def _read(self, q_BxTxHxD: jax.Array, k_BxSxKxD: jax.Array, v_BxSxKxD: jax.Array, first: int | jax.Array) -> jax.Array:
        """float32 [B, T, H, D] of queries at positions first .. first + T - 1 and keys at 0 .. S - 1; operands are rounded to
        config.dtype."""
        operands = self._rounded(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD)
        with _named(self.config.implementation):
            out = sparse_attention(*operands, self.mask, q_offset=first, implementation=self.config.implementation)
        return out.astype(jnp.float32)

    def _rounded(self, *arrays: jax.Array) -> list[jax.Array]:
        return [x.astype(DTYPES[self.config.dtype]) for x in arrays]

    def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
        operands = self._rounded(*self._projected(x_BxTxC, 0))
        with _named(self.config.implementation):
            out = sharded_attention.attend(*operands, self.mask, implementation=self.config.implementation)
        return self._merged(out.astype(jnp.float32))

    def _slots(self, context: int) -> int:
        """Of the cache: as many as positions are seen, where the mask has a last one."""
        before = reach(self.mask)
        return context if before is None else min(before + 1, context)

    def cache_specs(self, batch: int, context: int) -> dict[str, Spec]:
        """An empty cache (zeros): slot s holds the latest position p with p % slots == s."""
        slots = self._slots(context)
        shape = (batch, slots, self.config.kv_heads, self.config.head_dim)
        axes = ("batch", "window" if slots < context else "context", "kv_heads", "head_dim")
        return {name: Spec(shape, DTYPES[self.config.dtype], axes) for name in ("key", "value")}

    def decode(self, x_BxTxC: jax.Array, cache: dict[str, jax.Array], index: jax.Array):
        """Positions index .. index + T - 1, given those before in `cache`: (output [B, T, width], cache)."""
        q, k, v = self._projected(x_BxTxC, index)
        fresh = {"key": k.astype(cache["key"].dtype), "value": v.astype(cache["value"].dtype)}
        before = reach(self.mask)
        if before is not None and before + 1 == cache["key"].shape[1]:
            heads, cache = self._rolled(q, fresh, cache, index)
        else:
            cache = {name: jax.lax.dynamic_update_slice_in_dim(cache[name], fresh[name], index, axis=1) for name in cache}
            heads = self._read(q, cache["key"], cache["value"], index)
        return self._merged(heads), cache

    def _rolled(self, q_BxTxHxD: jax.Array, fresh: dict[str, jax.Array], cache: dict[str, jax.Array], index: jax.Array):
        """(float32 [B, T, H, D], cache) where the cache holds no more positions than a query sees."""
        slots, t = cache["key"].shape[1], q_BxTxHxD.shape[1]
        positions_T = index + jnp.arange(t)
        latest = index - 1  # slot s holds the greatest position <= latest that is s modulo slots; below 0 it is empty
        held_S = latest - (latest - jnp.arange(slots)) % slots
        # beside the new ones, not after writing them: with several, the last may overwrite what the first still sees
        seen = visible(self.mask, positions_T, jnp.concatenate([held_S, positions_T]))
        both = [jnp.concatenate([cache[name], fresh[name]], axis=1) for name in ("key", "value")]
        heads = attend(q_BxTxHxD, *both, seen, self.config.dtype)
        kept = slice(max(0, t - slots), t)
        return heads, {name: cache[name].at[:, positions_T[kept] % slots].set(fresh[name][:, kept]) for name in cache}
