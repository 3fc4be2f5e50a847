"""Attention by blocks in plain JAX: what runs on CPU, and anywhere else where there is no kernel.

Time and memory are linear in the number of non-empty blocks; going backward, scores are computed again. Lists that the mask
alone decides and that all heads share are laid out before anything runs (`xla_plan`); other lists are looped over as they come
(`xla_loops`). Both may be differentiated any number of times, the first time in reverse mode.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import xla_loops, xla_shared
from pallas_kernels.attention.algebra import Mask
from pallas_kernels.attention.block_mask import BlockMask, SelectedBlocks, inner, own_blocks
from pallas_kernels.attention.blocks import xla_block_sizes
from pallas_kernels.attention.derivatives import in_words, reverse_only
from pallas_kernels.attention.lists import Segments, Sizes
from pallas_kernels.attention.score_mod import traced
from pallas_kernels.attention.xla_pieces import varying
from pallas_kernels.attention.xla_tiles import Rule


class Call(NamedTuple):
    """What is known of a call before it runs."""

    rule: Rule
    listed: Mask | BlockMask | None  # what lists are made from; None if from SelectedBlocks
    sizes: Sizes
    q_offset: int | None  # None: it is data
    on_a_mesh: bool  # then nothing may loop over sequences, which a mesh may split
    counted: bool = False  # whether loops over lists end where the longest could, and not where the list does

    @property
    def shared(self) -> bool:
        """Whether one known list serves all sequences and heads."""
        mask = self.rule.mask
        return self.q_offset is not None and self.listed is not None and not mask.heads and not mask.batch


class Data(NamedTuple):
    """What is data, and has no gradient. Offsets: int32 [] or [batch]."""

    index: Any  # of SelectedBlocks, or None
    q_offset: Any
    segments: Segments | None
    others: list[Any]  # what score_mod closes over and has no gradient


def attend(q, k, v, mask, *, q_offset, score_mod, segment_ids, sinks, softcap, scale):
    """As `reference.attend`."""
    t, s = q.shape[1], k.shape[1]
    selected = mask if isinstance(mask, SelectedBlocks) else None
    static = q_offset if isinstance(q_offset, int) else None
    own = own_blocks(mask)
    sizes = Sizes(t, s, *own) if own else xla_block_sizes(mask, t, s, static)
    before, rest = _scales(scale, q.dtype)
    program, inexact, floats, others = _hoisted(score_mod, jnp.promote_types(q.dtype, jnp.float32))
    call = Call(
        Rule(inner(mask), rest, softcap, program, inexact),
        None if selected is not None else mask,
        sizes,
        static,
        _on_a_mesh(),
    )
    data = Data(None if selected is None else selected.index, jnp.asarray(q_offset, jnp.int32), segment_ids, others)
    # outside of what has a rule of its own: within shard_map their gradients are then summed by JAX
    sinks, floats = varying((sinks, floats), q, k, v)
    q, k, v, sinks, floats = reverse_only("xla", (q, k, v, sinks, floats))
    with in_words("xla"):
        return _jitted(call, q * before, k, v, sinks, floats, data)


def _on_a_mesh() -> bool:
    """Whether the compiler may split arrays here: not where `jax.shard_map` took all axes that there are more than one device
    along."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 and axis not in mesh.manual_axes for axis, size in mesh.shape.items())


def _scales(scale: float, dtype: Any) -> tuple[float, float]:
    """(of queries, of products): what queries can be multiplied with beforehand. bfloat16 is so by powers of two, which lose
    nothing to rounding; float16 by nothing, since it would soon overflow."""
    if dtype == jnp.float16:
        return 1.0, scale
    if not scale or dtype != jnp.bfloat16:
        return scale, 1.0
    before = 2.0 ** round(math.log2(abs(scale)))
    return before, scale / before


def _hoisted(score_mod: Any, dtype: Any) -> tuple[Any, tuple[bool, ...], list[Any], list[Any]]:
    """The function of single scores as a program without the arrays that it closes over; which of those have gradients; these;
    the others."""
    if score_mod is None:
        return None, (), [], []
    program = traced(score_mod, dtype)
    consts = [jnp.asarray(const) for const in program.consts]
    inexact = tuple(jnp.issubdtype(const.dtype, jnp.inexact) for const in consts)
    floats, others = ([c for c, yes in zip(consts, inexact) if yes is which] for which in (True, False))
    return program.jaxpr, inexact, floats, others


def _run(call: Call, segments: Segments | None, name: str) -> Any:
    """`forward` or `backward` of one of the two ways, a function of its arguments but `call`."""
    if call.shared and segments is None:
        return functools.partial(getattr(xla_shared, name), call)
    return functools.partial(_looped, name, call)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _looped(name: str, call: Call, *arguments: Any) -> Any:
    return getattr(xla_loops, name)(call, *arguments)


@_looped.defjvp
def _looped_jvp(name: str, call: Call, primals: Any, tangents: Any) -> Any:
    """Of what is itself a derivative: JAX transposes no loop whose end is read from a list."""
    return jax.jvp(functools.partial(getattr(xla_loops, name), call._replace(counted=True)), primals, tangents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, q, k, v, sinks, floats, data: Data):
    return _forward(call, q, k, v, sinks, floats, data)[0]


def _forward(call: Call, q, k, v, sinks, floats, data: Data):
    # what is not finite shows in the score of who sees it, and nowhere else
    bad = ~(jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1))
    marked, clean = jnp.where(bad[..., None], jnp.nan, k), jnp.where(jnp.isfinite(v), v, 0)
    out, lse = _run(call, data.segments, "forward")(q, marked, clean, sinks, floats, data)
    return (out.astype(q.dtype), lse), (q, k, v, sinks, floats, data, out.astype(q.dtype), lse)


def _backward(call: Call, saved, cotangents):
    q, k, v, sinks, floats, data, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(out.astype(lse.dtype) * d_out.astype(lse.dtype), axis=-1) - d_lse
    # who sees nothing has -inf, and no weights; who sees something that is not finite has a NaN, and so have its weights
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    q, k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, k, v))
    d_q, d_k, d_v, d_floats = _run(call, data.segments, "backward")(q, k, v, floats, data, lse, delta, d_out)
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(sinks.astype(lse.dtype)[None, None] - lse) * delta, axis=(0, 1)).astype(sinks.dtype)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_sinks, d_floats, None


_attend.defvjp(_forward, _backward)
_jitted = jax.jit(_attend, static_argnums=0)
