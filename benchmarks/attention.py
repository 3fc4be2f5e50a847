"""Attention by blocks, ours beside JAX's own, torch's and FlexAttention: float32, one sequence, 4 heads x 64.

Ours is what `sparse_attention` chooses here. Where both sides compute the same, outputs (and gradients, where they are timed)
agree before anything is timed: to 2e-5 of the largest for values, 1e-4 for gradients. Both sides may use the processors that
this process may. Before each call there is a pause, since threads of one side wait busily for a while after their work and
would take the processors of the other. A window of 512 is the query's own key and 511 before. FlexAttention: forward alone.
`gnomon bench attention_counts` sets ours beside JAX's splash attention on a TPU, `attention_steps` in whole training steps.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Sequence

from research.core.memory import keep_freed_memory

keep_freed_memory()  # as `gnomon train` does, before JAX runs anything

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402

from benchmarks.harness import compare, run  # noqa: E402
from pallas_kernels.attention import masks, sparse_attention  # noqa: E402

NEEDS_PEERS = True
HEADS, HEAD_DIM, WINDOW = 4, 64, 512
PAUSE = 0.1  # seconds
WINDOWED = masks.window(WINDOW - 1, 0)


@functools.lru_cache(maxsize=1)
def arrays(length: int) -> tuple[np.ndarray, ...]:
    """q, k, v and the gradient of the output, [1, length, heads, head_dim]."""
    rng = np.random.default_rng(length)
    return tuple(rng.standard_normal((1, length, HEADS, HEAD_DIM), np.float32) for _ in range(4))


def in_jax(attention, length: int, backward: bool):
    q, k, v, d_out = (jnp.asarray(x) for x in arrays(length))

    def both(q, k, v, d_out):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(d_out)

    compiled = jax.jit(both) if backward else jax.jit(lambda q, k, v, _: (attention(q, k, v),))
    return lambda: jax.block_until_ready(compiled(q, k, v, d_out))


def ours(mask, length: int, backward: bool):
    return in_jax(lambda q, k, v: sparse_attention(q, k, v, mask), length, backward)


def head_by_head(attention):
    """The same, one head after another."""

    def looped(q, k, v):
        heads = (jnp.moveaxis(x, 2, 0)[:, :, :, None] for x in (q, k, v))  # [heads, batch, length, 1, head_dim]
        return jnp.moveaxis(jax.lax.map(lambda one: attention(*one)[:, :, 0], tuple(heads)), 0, 2)

    return looped


def in_torch(attention, length: int, backward: bool):
    """The same of torch, whose heads come before the length."""
    q, k, v, d_out = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in arrays(length))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]

    def call():
        if not backward:
            with torch.no_grad():
                return (attention(*leaves).transpose(1, 2),)
        out = attention(*leaves)
        return tuple(x.detach().transpose(1, 2) for x in (out, *torch.autograd.grad(out, leaves, d_out)))

    return call


def causal_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex(length: int):
    def seen(b, h, q, kv):
        return (kv <= q) & (q - kv < WINDOW)

    blocks = create_block_mask(seen, None, None, length, length, device="cpu")
    return functools.partial(torch.compile(flex_attention), block_mask=blocks)


def agree(work: str, sides) -> None:
    """Raises AssertionError where a side computes something else than the first."""
    found = {name: [np.asarray(x) for x in call()] for name, call in sides.items()}
    first = next(iter(found.values()))
    for name, outputs in found.items():
        for i, (got, wanted) in enumerate(zip(outputs, first)):
            np.testing.assert_allclose(
                got, wanted, rtol=0, atol=(1e-4 if i else 2e-5) * np.abs(wanted).max(), err_msg=f"{work}: {name}, output {i}"
            )


def row(work: str, sides, same: bool = True):
    """same: whether the sides compute the same, which is then checked."""
    if same:
        agree(work, sides)
    return compare(work, sides, pause=PAUSE)


def against_jax() -> list[dict]:
    """Windows, forward and backward, beside JAX's attention with the same mask, which computes all pairs."""
    rows = []
    for length in (4096, 8192, 16384):
        dense = functools.partial(jax.nn.dot_product_attention, local_window_size=(WINDOW - 1, 0))
        one_by_one = length == 16384  # an array of all scores has 4.3 GB, and there are several
        peer = "jax.nn, head by head" if one_by_one else "jax.nn"
        attention = head_by_head(dense) if one_by_one else dense
        work = f"window {WINDOW}, {length}, forward and backward"
        rows.append(row(work, {"ours": ours(WINDOWED, length, True), peer: in_jax(attention, length, True)}))
    return rows


def growth() -> dict:
    """How time and memory of ours grow with the length, with nothing run beside it."""
    lengths = (4096, 8192, 16384)
    work = f"window {WINDOW}, forward and backward"
    alone = [compare(f"{work}, {length}", {"ours": ours(WINDOWED, length, True)}, pause=PAUSE) for length in lengths]
    times = [row["sides"]["ours"]["median"] for row in alone]
    slope = np.polyfit(np.log(lengths), np.log(times), 1)[0]
    memory = []
    for length in lengths:
        spec = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.float32)
        grads = jax.grad(lambda q, k, v: sparse_attention(q, k, v, WINDOWED).sum(), (0, 1, 2))
        memory.append(jax.jit(grads).lower(spec, spec, spec).compile().memory_analysis().temp_size_in_bytes)
    return {
        "work": f"window {WINDOW}, growth from {lengths[0]} to {lengths[-1]}",
        "facts": {
            "ours": {
                "median seconds": [round(time, 4) for time in times],
                "log-log slope of time": round(float(slope), 3),
                "log-log slope of temporary memory": round(float(np.polyfit(np.log(lengths), np.log(memory), 1)[0]), 3),
                "temporary bytes": memory,
            }
        },
    }


def against_torch() -> list[dict]:
    rows = []
    for length in (2048, 8192, 16384):
        sides = {"ours": ours(WINDOWED, length, False), "FlexAttention, compiled": in_torch(flex(length), length, False)}
        rows.append(row(f"window {WINDOW}, {length}, forward", sides))
    sides = {"ours": ours(WINDOWED, 8192, True), "torch SDPA, causal": in_torch(causal_sdpa, 8192, True)}
    rows.append(row(f"window {WINDOW}, 8192, forward and backward", sides, same=False))
    for length in (512, 1024, 2048, 4096):
        sides = {"ours": ours(masks.causal(), length, True), "torch SDPA, causal": in_torch(causal_sdpa, length, True)}
        rows.append(row(f"causal, {length}, forward and backward", sides))
    return rows


def random_blocks(length: int = 16384, size: int = 128, share: float = 0.1) -> list[dict]:
    """A tenth of all blocks, drawn at random, beside dense attention of all pairs, JAX's and torch's."""
    count = round(share * math.ceil(length / size))
    mask = masks.random_blocks(0, size, count, length)
    sides = {
        "ours": ours(mask, length, False),
        "jax.nn, dense, head by head": in_jax(head_by_head(jax.nn.dot_product_attention), length, False),
        "torch SDPA, dense": in_torch(F.scaled_dot_product_attention, length, False),
    }
    return [row(f"{share:.0%} of blocks of {size}, {length}, forward", sides, same=False)]


PARTS = {"growth": lambda: [growth()], "torch": against_torch, "random": random_blocks, "jax": against_jax}


def main(part: Sequence[str]) -> list[dict]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    small, sizes = 2048, 128
    mask = masks.random_blocks(0, sizes, 2, small)
    pairs = jnp.asarray(mask(0, 0, np.arange(small)[:, None], np.arange(small)[None]))[None, None]
    dense = functools.partial(jax.nn.dot_product_attention, mask=pairs)
    agree("random blocks", {"ours": ours(mask, small, True), "jax.nn": in_jax(dense, small, True)})
    return [row for name in part for row in PARTS[name]()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="which rows; all, unless said")
    run(main, parser)
