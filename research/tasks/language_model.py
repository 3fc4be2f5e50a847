"""Next-token prediction."""

from __future__ import annotations

import jax.numpy as jnp

from research.core.types import Example, Method, Spec, Task
from research.models.transformer import transformer
from research.nn import checks
from research.nn.functional import Functional
from research.nn.losses import cross_entropy
from research.tasks._supervised import masked_loss, predicting


def language_model(model: Functional, *, batch: int, length: int, label_smoothing: float, z_loss: float) -> Task:
    """The Task of predicting each next token, for a model of tokens such as `models.transformer`.

    Batches are {"inputs": int32 [batch, length], "targets": the same, "mask": float32 [batch, length]}, 1 where a target
    counts. Loss: the masked mean of nats a token (see `nn.losses.cross_entropy` for label_smoothing and z_loss). Metrics:
    "nll", in nats a token without either, and "accuracy".

    Methods:
        predict {"inputs": int32 [batch, length]} -> logits float32 [batch, length, vocab].
        embed   the same -> what the output layer reads, float32 [batch, length, width].
        decode  {"tokens": int32 [batch, 1], "cache", "index": int32 scalar} -> {"logits": float32 [batch, 1, vocab], "cache"}.
                The cache is zeros of its Specs at first, index the position of the first token. It takes more tokens as well.
    `tasks.generate` samples with decode.

    Raises ValueError where length exceeds the model's context.
    """
    checks.positive("task.batch", batch)
    checks.positive("task.length", length)
    checks.fraction("task.label_smoothing", label_smoothing)
    checks.not_negative("task.z_loss", z_loss)
    context = model.ask("context_length")
    if length > context:
        raise ValueError(f"task.length={length} exceeds model.context={context}")

    def per_token(logits, batch):
        loss, nll = cross_entropy(logits, batch["targets"], label_smoothing=label_smoothing, z_loss=z_loss)
        return loss, {"nll": nll, "accuracy": jnp.argmax(logits, axis=-1) == batch["targets"]}

    def decode(variables, inputs, key):
        given = inputs["tokens"], inputs["cache"], inputs["index"]
        (logits, cache), _ = model.apply(variables, *given, key=key, method="decode")
        return {"logits": logits, "cache": cache}

    tokens = Spec((batch, length), jnp.int32, ("batch", "length"))
    cache_specs = model.ask("cache_specs", batch)
    one = {
        "tokens": Spec((batch, 1), jnp.int32, ("batch", None)),
        "cache": cache_specs,
        "index": Spec((), jnp.int32),
    }
    methods = {
        "predict": Method(predicting(model), {"inputs": tokens}),
        "embed": Method(predicting(model, "hidden"), {"inputs": tokens}),
        "decode": Method(decode, one),
    }
    specs = {"inputs": tokens, "targets": tokens, "mask": Spec((batch, length), jnp.float32, ("batch", "length"))}
    return Task(model.init, masked_loss(model, per_token), methods, specs, model.axes)


def example() -> Example:
    model = transformer(
        vocab=11, context=8, width=8, layers=2, heads=2, kv_heads=1, head_dim=0,
        attention={"mask": ["window(2, 0)", "full()"], "implementation": ""}, rope_base=1e4, qk_norm=1.0, mlp="swiglu",
        mlp_width=12, norm="rms", conv=0, dropout=0.0, ngrams=[2], ngram_bits=4, ngram_width=4, induction=[2], copy=True,
        tie_embeddings=False, embed_scale=1.0, embed_norm=True, zero_init=False, dtype="float32", scan_layers=False,
        remat=["none"],
    )  # fmt: skip
    return Example(language_model(model, batch=4, length=8, label_smoothing=0.0, z_loss=0.0))
