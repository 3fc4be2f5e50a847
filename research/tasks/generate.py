"""Sampling from a language model through its "decode" method."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from research.core.types import Array, Key, Method, Tree, Variables


def empty_cache(decode: Method, batch: int) -> Tree:
    """Zeros of the cache of a "decode" method, for `batch` rows in place of those of its Specs."""

    def zeros(spec):
        return jnp.zeros([batch if axis == "batch" else size for size, axis in zip(spec.shape, spec.axes)], spec.dtype)

    return jax.tree.map(zeros, decode.inputs["cache"])


def context_of(decode: Method) -> int | None:
    """How many positions a "decode" method can hold; None where every layer has a sliding window, which never fills up."""
    specs = jax.tree.leaves(decode.inputs["cache"])
    sizes = [size for spec in specs for size, axis in zip(spec.shape, spec.axes) if axis == "context"]
    return min(sizes, default=None)


def drawn(logits: Array, key: Key, temperature: float, top_k: int) -> Array:
    """int32 [batch], one token a row of logits [batch, vocab]: the likeliest where temperature is 0, else drawn from
    softmax(logits / temperature) over the `top_k` likeliest (0: over all)."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k:
        floor = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("decode", "tokens", "temperature", "top_k"))
def _continued(variables, prompt, cache, key, *, decode, tokens, temperature, top_k):
    def next_token(given, cache, index, key):
        key_apply, key_draw = jax.random.split(key)
        out = decode(variables, {"tokens": given, "cache": cache, "index": index}, key_apply)
        return drawn(out["logits"][:, -1], key_draw, temperature, top_k), out["cache"]

    def step(carry, i):
        token, cache, index = carry
        new, cache = next_token(token[:, None], cache, index, jax.random.fold_in(key, i))
        return (new, cache, index + 1), token

    length = prompt.shape[1]
    first, cache = next_token(prompt, cache, jnp.int32(0), jax.random.fold_in(key, 0))
    (last, _, _), sampled = jax.lax.scan(step, (first, cache, jnp.int32(length)), jnp.arange(1, tokens))
    return jnp.concatenate([sampled, last[None]]).T


def check_request(decode: Method, length: int, *, tokens: int, temperature: float, top_k: int) -> None:
    """ValueError (one line) where `generate` cannot go on from `length` tokens so."""
    if not length or tokens < 1:
        raise ValueError(f"generate: {length} tokens of prompt and {tokens} to come; both must be at least 1")
    if temperature < 0 or top_k < 0:
        raise ValueError(f"generate: temperature={temperature} and top_k={top_k} must not be negative")
    context = context_of(decode)
    if context is not None and length + tokens - 1 > context:
        most = context + 1 - length
        raise ValueError(
            f"generate: {length} tokens of prompt + {tokens} to come (sample.tokens) exceed the context of {context} "
            f"(model.context); at most {most} to come, the last of which is not read"
        )


def generate(
    decode: Method, variables: Variables, prompt: Array, key: Key, *, tokens: int, temperature: float, top_k: int
) -> Array:
    """int32 [batch, tokens] that go on from `prompt`, int32 [batch, length]: one pass over the prompt, then a token at a time.

    decode: `task.methods["decode"]` of a language model; variables of one model (not stacked). The compiled program is kept for
    each `decode` and shape. temperature 0 takes the likeliest token; top_k 0 draws from all.

    Raises ValueError where the prompt is empty, a number is out of range, or more positions would be read than the cache holds.
    """
    check_request(decode, prompt.shape[1], tokens=tokens, temperature=temperature, top_k=top_k)
    cache = empty_cache(decode, prompt.shape[0])
    options = {"tokens": tokens, "temperature": temperature, "top_k": top_k}
    return _continued(variables, jnp.asarray(prompt, jnp.int32), cache, key, decode=decode.apply, **options)
