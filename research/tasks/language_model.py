"""Next-token prediction."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from research.core import metrics
from research.core.types import Aux, Example, Method, Spec, Task
from research.nn import checks
from research.nn.functional import Functional
from research.nn.losses import cross_entropy


def language_model(model: Functional, *, batch: int, length: int, label_smoothing: float, z_loss: float) -> Task:
    """The Task of predicting each next token, for a model of tokens such as `models.transformer`.

    Batches are {"inputs": int32 [batch, length], "targets": the same, "mask": float32 [batch, length]}, 1 where a target
    counts. Loss: the masked mean of nats a token (see `nn.losses.cross_entropy` for label_smoothing and z_loss). Metrics:
    "nll", in nats a token without either, and "accuracy".

    Methods:
        predict {"inputs": int32 [batch, length]} -> logits float32 [batch, length, vocab].
        embed   the same -> what the output layer reads, float32 [batch, length, width].
        decode  {"tokens": int32 [batch, 1], "cache": ..., "index": int32 scalar} -> {"logits": [batch, 1, vocab], "cache":
        ...}. The
                cache is zeros of its Specs at first; index is the position of the first token. More tokens at once may be given.
    `tasks.generate` samples with decode.

    Raises ValueError where length exceeds the model's context.
    """
    checks.positive("task.batch", batch)
    checks.positive("task.length", length)
    checks.fraction("task.label_smoothing", label_smoothing)
    context = model.ask("context_length")
    if length > context:
        raise ValueError(f"task.length={length} exceeds model.context={context}")

    def loss(variables, batch, key):
        logits, state = model.apply(variables, batch["inputs"], key=key, train=True)
        trained, nll = cross_entropy(logits, batch["targets"], label_smoothing=label_smoothing, z_loss=z_loss)
        mask = batch["mask"]
        pair = metrics.masked(trained, mask)
        hits = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
        measured = {"nll": metrics.masked(nll, mask), "accuracy": metrics.masked(hits, mask)}
        return metrics.mean(pair), Aux(state, jax.lax.stop_gradient(measured), pair[1])

    def predict(variables, inputs, key):
        return model.apply(variables, inputs["inputs"], key=key)[0]

    def embed(variables, inputs, key):
        return model.apply(variables, inputs["inputs"], key=key, method="hidden")[0]

    def decode(variables, inputs, key):
        given = inputs["tokens"], inputs["cache"], inputs["index"]
        (logits, cache), _ = model.apply(variables, *given, key=key, method="decode")
        return {"logits": logits, "cache": cache}

    tokens = Spec((batch, length), jnp.int32, ("batch", "length"))
    one = {
        "tokens": Spec((batch, 1), jnp.int32, ("batch", None)),
        "cache": model.ask("cache_specs", batch),
        "index": Spec((), jnp.int32),
    }
    methods = {
        "predict": Method(predict, {"inputs": tokens}),
        "embed": Method(embed, {"inputs": tokens}),
        "decode": Method(decode, one),
    }
    # every token counts, so what a weight sums over is the whole of [batch, length]; rows are what may be split
    specs = {"inputs": tokens, "targets": tokens, "mask": Spec((batch, length), jnp.float32, ("batch", "length"))}
    return Task(model.init, loss, methods, specs, model.axes)


def example() -> Example:
    from research.models.transformer import transformer

    model = transformer(
        vocab=11, context=8, width=8, layers=2, heads=2, kv_heads=1, head_dim=0, pattern="LG", window=3, rope_base=1e4,
        qk_norm=True, mlp="swiglu", mlp_width=12, norm="rms", conv=0, dropout=0.0, tie_embeddings=False, zero_init=False,
        dtype="float32", attention="dense", scan_layers=False, remat=False,
    )  # fmt: skip
    return Example(language_model(model, batch=4, length=8, label_smoothing=0.0, z_loss=0.0))
