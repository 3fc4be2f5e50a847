"""Attention on whatever mesh is in use: by devices' own sequences and heads, and in a ring where sequences themselves are cut.

Kernels are programs of one device, which the compiler cannot split; so what is split is said here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.attention import sparse_attention
from pallas_kernels.attention.algebra import Mask
from research.core.mesh import axes_of, size_of
from research.nn.ring import ring_attention


class Cut(NamedTuple):
    """The mesh axes that a dimension is cut over; () where it is whole. kv_heads: those of `heads`, or () where every device
    has all key heads and reads one."""

    batch: tuple[str, ...]
    length: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    segment_ids: jax.Array | None = None,
    sinks: jax.Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`sparse_attention` of queries [batch, length, q_heads, d_qk] on keys and values of as many positions, laid out as the
    mesh in use says: "batch" and "heads" over their mesh axes, and "length" in a ring (`ring_attention`).

    Without a mesh it is `sparse_attention`. A batch or heads that do not divide, or that the mask tells apart, stay whole on
    every device. Key heads that do not divide stay whole where a device's queries read one of them; else all heads do.

    Returns [batch, length, q_heads, d_v] in q's dtype. Raises ValueError for a length that does not divide.
    """
    options = {"softcap": softcap, "scale": scale, "implementation": implementation}
    cut = cut_of(q.shape, k.shape[2], mask)
    if not any(cut):
        return sparse_attention(q, k, v, mask, segment_ids=segment_ids, sinks=sinks, **options)

    def local(q, k, v, segment_ids, sinks):
        if cut.heads and not cut.kv_heads:
            k, v = (_own_head(x, cut.heads) for x in (k, v))
        if cut.length:
            return ring_attention(q, k, v, mask, axis=cut.length, segment_ids=segment_ids, sinks=sinks, **options)
        return sparse_attention(q, k, v, mask, segment_ids=segment_ids, sinks=sinks, **options)

    batch, length, heads, kv_heads = (over or None for over in cut)
    queries, keys = jax.P(batch, length, heads), jax.P(batch, length, kv_heads)
    # All axes that nobody took: those of an enclosing vmap (its spmd_axis_name) must be among them. Kernels do not say over
    # which axes their results vary, so that this is not checked.
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    specs = queries, keys, keys, jax.P(batch, length), jax.P(heads)
    run = jax.shard_map(local, in_specs=specs, out_specs=queries, axis_names=free, check_vma=False)
    return run(q, k, v, segment_ids, sinks)


def cut_of(q_shape: tuple[int, ...], kv_heads: int, mask: Mask) -> Cut:
    """How the layout in use cuts attention. Raises ValueError for a length that does not divide."""
    batch, length, heads, _ = q_shape
    taken: set[str] = set()

    def over(name: str, size: int, apart: int) -> tuple[str, ...]:
        axes = tuple(a for a in axes_of(name) if a not in taken)
        if apart or size % size_of(axes):
            return ()
        taken.update(axes)
        return axes

    over_length = axes_of("length")
    if length % size_of(over_length):
        name = "x".join(over_length)
        raise ValueError(f"attention: length {length} is not divisible by mesh {name}={size_of(over_length)}")
    taken.update(over_length)
    over_batch, over_heads = over("batch", batch, mask.batch), over("heads", heads, mask.heads)
    parts = size_of(over_heads)
    if kv_heads % parts == 0:
        return Cut(over_batch, over_length, over_heads, over_heads)
    return Cut(over_batch, over_length, over_heads if parts % kv_heads == 0 else (), ())


def _own_head(x_BxSxKxD: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The one key head that this device's query heads read, of K that the number of devices is a multiple of."""
    each = size_of(axes) // x_BxSxKxD.shape[2]
    return jax.lax.dynamic_slice_in_dim(x_BxSxKxD, jax.lax.axis_index(axes) // each, 1, axis=2)
