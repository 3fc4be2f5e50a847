"""A decoder-only transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from pallas_kernels.attention.algebra import Mask
from research.core.mesh import constrained
from research.nn import checks, stack
from research.nn.attention import AttentionConfig
from research.nn.block import Block, BlockConfig
from research.nn.embed import Embed
from research.nn.functional import Functional, Layer, functional
from research.nn.history import History, Recalled
from research.nn.induction import CopyHead
from research.nn.linear import Linear
from research.nn.masks import layered
from research.nn.norms import NORMS


class Transformer(Layer):
    """int32 tokens [batch, length] -> float32 logits [batch, length, vocab]."""

    def __init__(self, block: BlockConfig, vocab: int, context: int, layers: int, period: int, masks: tuple[Mask, ...],
                 ngrams: Sequence[int], ngram_bits: int, ngram_width: int, induction: Sequence[int], copy: bool,
                 tie_embeddings: bool, embed_scale: float, embed_norm: bool, scan: bool, remat: tuple[str, ...],
                 rngs: nnx.Rngs):  # fmt: skip
        width, dtype = block.attention.width, block.attention.dtype
        self.dtype, self.context, self.layers, self.scan, self.remat = dtype, context, layers, scan, remat
        self.embed = Embed(vocab, width, scale=embed_scale, rngs=rngs)
        self.embed_norm = NORMS["plain_rms"](width, rngs=rngs) if embed_norm else None
        recalls = bool(ngrams or induction)
        grams = (ngrams, ngram_bits, ngram_width)
        self.history = History(*grams, induction, vocab, width, dtype=dtype, rngs=rngs) if recalls else None
        self.blocks = stack.build(lambda i, r: Block(block, masks[i % len(masks)], r), layers, period, scan, rngs)
        self.norm = NORMS[block.norm](width, rngs=rngs)
        out_init = block.attention.out_init
        self.head = None if tie_embeddings else Linear(width, vocab, ("embed", "vocab"), dtype=dtype, init=out_init, rngs=rngs)
        self.copy = CopyHead(len(induction), width, dtype=dtype, rngs=rngs) if copy else None

    def _logits(self, hidden_BxTxC: jax.Array, recalled: Recalled | None) -> jax.Array:
        logits = self.embed.logits(hidden_BxTxC, self.dtype) if self.head is None else self.head(hidden_BxTxC)
        return logits if self.copy is None else self.copy(logits, hidden_BxTxC, recalled.followed)

    def _embedded(self, tokens_BxT: jax.Array, recalled: Recalled | None) -> jax.Array:
        x = self.embed(tokens_BxT)
        x = x if recalled is None else x + recalled.embedding
        x = x if self.embed_norm is None else self.embed_norm(x)
        return constrained(x, "batch", "length", "embed")

    def _hidden(self, tokens_BxT: jax.Array) -> tuple[jax.Array, Recalled | None]:
        recalled = None if self.history is None else self.history(tokens_BxT)
        x = self._embedded(tokens_BxT, recalled)
        x, _ = stack.run(self.blocks, lambda block, x, _: (block(x), None), x, scan=self.scan, remat=self.remat)
        return self.norm(x), recalled

    def hidden(self, tokens_BxT: jax.Array) -> jax.Array:
        """What the output layer reads: float32 [batch, length, width]."""
        return self._hidden(tokens_BxT)[0]

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        return self._logits(*self._hidden(tokens_BxT))

    def context_length(self) -> int:
        """The most positions that it may be given."""
        return self.context

    def cache_specs(self, batch: int) -> dict[str, Any]:
        """Specs of the cache of `decode`; it is zeros at first."""
        cache = {"blocks": stack.cache_specs(self.blocks, lambda b: b.cache_specs(batch, self.context), self.layers, self.scan)}
        return cache if self.history is None else cache | {"history": self.history.cache_specs(batch, self.context)}

    def decode(self, tokens_BxT: jax.Array, cache: dict[str, Any], index: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Logits of positions index .. index + T - 1 given the cache of those before; (logits, cache)."""
        new, recalled = {}, None
        if self.history is not None:
            recalled, new["history"] = self.history.decode(tokens_BxT, cache["history"], index)
        x = self._embedded(tokens_BxT, recalled)
        x, new["blocks"] = stack.run(
            self.blocks, lambda block, x, cache: block.decode(x, cache, index), x, cache["blocks"], scan=self.scan
        )
        return self._logits(self.norm(x), recalled), new


def transformer(
    *,
    vocab: int,
    context: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    attention: Mapping[str, Any],
    rope_base: float,
    qk_norm: float,
    mlp: str,
    mlp_width: int,
    norm: str,
    conv: int,
    dropout: float,
    ngrams: Sequence[int],
    ngram_bits: int,
    ngram_width: int,
    induction: Sequence[int],
    copy: bool,
    tie_embeddings: bool,
    embed_scale: float,
    embed_norm: bool,
    zero_init: bool,
    dtype: str,
    scan_layers: bool,
    remat: Sequence[str],
) -> Functional:
    """A decoder-only transformer: pre-norm blocks, int32 [batch, length <= context] -> logits [batch, length, vocab].

    Attention. head_dim: of a head; 0 for width / heads. attention: {"mask", "implementation"}, see `nn.masks.layered`; masks
    are expressions such as "window(511, 0) | global_tokens(64)", one a layer, repeated, and no layer sees what comes later.
    rope_base: of the rotary embedding, 0 for none. qk_norm: 0 for none, else queries and keys are RMS-normalized, and the scale
    of queries begins at qk_norm.

    Blocks. mlp: gelu, relu, silu, squared_relu or swiglu. norm: rms, plain_rms or layer. conv: taps of a short causal
    convolution before attention, 0 for none. zero_init: what is added to the residual stream, and the output layer, start at
    zero.

    Embeddings. embed_scale: the deviation they start with. tie_embeddings: the table is the output layer, too (then width^-1/2
    is a good scale). ngrams: orders n of hashed n-gram embeddings, [] for none: 2^ngram_bits rows of ngram_width numbers each,
    projected to width. induction: orders n of embeddings of what followed the last n tokens when they last occurred, [] for
    none; copy: each of these votes for its token in the logits, too. embed_norm: the sum of all embeddings is RMS-normalized.

    Computing. dtype: operands of products, float32 or bfloat16; parameters, sums and the residual stream are float32.
    scan_layers: one scan over stacked layers. remat: what is kept of a layer for the backward pass, names of `nn.stack.REMAT`,
    one a layer, repeated; none keeps all of it, full nothing, which computes it again.

    Raises ValueError, naming the config's key, for sizes that cannot work.
    """
    for name, value in {"vocab": vocab, "context": context, "width": width, "layers": layers}.items():
        checks.positive(f"model.{name}", value)
    for name, scale in {"rope_base": rope_base, "qk_norm": qk_norm}.items():
        checks.not_negative(f"model.{name}", scale)
    if not head_dim:
        checks.divisible("model.width", width, "model.heads", heads)
    for n in (*ngrams, *induction):
        checks.positive("model.ngrams and model.induction: each", n)
    if copy and not induction:
        raise ValueError("model.copy=True copies what model.induction finds, and that is []; name orders, such as [3, 6, 12]")
    if ngrams:
        checks.positive("model.ngram_width", ngram_width)
        if not 1 <= ngram_bits <= 24:
            raise ValueError(f"model.ngram_bits={ngram_bits} must be at least 1 and at most 24")
    masks, implementation = layered(attention, layers, heads, causal=True)
    period = stack.pattern(layers, len(masks), remat)
    block = BlockConfig(
        AttentionConfig(
            width, heads, kv_heads, head_dim or width // heads, rope_base, qk_norm,
            "zeros" if zero_init else "normal", dtype, implementation,
        ),
        mlp, mlp_width, norm, conv, dropout,
    )  # fmt: skip
    block.check()
    return functional(
        lambda rngs: Transformer(
            block,
            vocab,
            context,
            layers,
            period,
            masks,
            tuple(ngrams),
            ngram_bits,
            ngram_width,
            tuple(induction),
            copy,
            tie_embeddings,
            embed_scale,
            embed_norm,
            scan_layers,
            tuple(remat),
            rngs,
        )  # fmt: skip
    )
