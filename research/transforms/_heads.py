"""What heads share that are made of a support at once, without steps: features of both parts, and the loss of the query."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core import metrics
from research.core.contracts import abstract_batch, abstract_key, abstract_variables
from research.core.names import choose
from research.core.types import Array, Aux, Batch, Key, Method, Spec, Task, Tree, Variables
from research.transforms._adapting import sized

# (variables of the transformed task, features of the support [S, F], their classes [S, ways], one-hot times the mask, features
# of the query [Q, F]) -> logits [Q, ways]
Classify = Callable[[Variables, Array, Array, Array], Array]
ABSENT = -1e9  # the logit of a class that the support does not show


def head(
    task: Task,
    ways: int,
    classify: Classify,
    inside: Callable[[Variables], Variables],
    *,
    method: str,
    support: int | None,
    who: str,
) -> Task:
    """A task of episodes: its batch is {"support", "query"} of {"inputs", "targets" int32, "mask"}.

    The features of an example are what the task's `method` gives for {"inputs"}, flattened, as in evaluation: no dropout, no
    batch statistics of its own, and state passes through. The loss is the query's cross entropy, a mean weighted by its mask,
    whose sum is Aux.weight. inside: the transformed task's variables -> the task's.
    """
    if ways < 2:
        raise ValueError(f"{who}: ways={ways}; allowed: 2 or more")
    if support is not None and support < 1:
        raise ValueError(f"{who}: support={support}; allowed: 1 or more, or None for the task's own batch")
    features = choose(task.methods, method, f"{who}: method")
    if not isinstance(features.inputs, dict) or set(features.inputs) != {"inputs"}:
        raise ValueError(f'{who}: method={method!r} takes {_named(features.inputs)}; allowed: one that takes "inputs" alone')
    inputs = features.inputs["inputs"]
    rows = inputs.shape[:1]
    _check_features(task, features, rows, who, method)

    def embedded(variables: Variables, inputs: Array, key: Key) -> Array:
        return features.apply(inside(variables), {"inputs": inputs}, key).reshape(inputs.shape[0], -1)

    def logits(variables: Variables, shown: Batch, asked: Batch, key: Key) -> Array:
        count = shown["inputs"].shape[0]
        both_BxF = embedded(variables, jnp.concatenate([shown["inputs"], asked["inputs"]]), key)
        shown_SxF, asked_QxF = both_BxF[:count], both_BxF[count:]
        mask_Sx1 = shown["mask"].astype(both_BxF.dtype)[:, None]
        labels_SxK = jax.nn.one_hot(shown["targets"], ways, dtype=both_BxF.dtype) * mask_Sx1
        found_QxK = classify(variables, shown_SxF, labels_SxK, asked_QxF)
        return jnp.where(labels_SxK.sum(0)[None] > 0, found_QxK, ABSENT)

    def loss(variables: Variables, batch: Batch, key: Key) -> tuple[Array, Aux]:
        found_QxK, query = logits(variables, batch["support"], batch["query"], key), batch["query"]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(found_QxK), query["targets"][:, None], 1)[:, 0]
        correct = jnp.argmax(found_QxK, 1) == query["targets"]
        pairs = {name: metrics.masked(x, query["mask"]) for name, x in {"nll": nll, "accuracy": correct}.items()}
        value, weight = metrics.mean(pairs["nll"]), pairs["nll"][1]
        return value, Aux(variables["state"], jax.lax.stop_gradient(pairs), weight)

    def predict(variables: Variables, inputs: Tree, key: Key) -> Array:
        return logits(variables, inputs["support"], inputs["query"], key)

    each = {"targets": Spec(rows, jnp.int32, ("batch",)), "mask": Spec(rows, jnp.float32, ("batch",))}
    query = {"inputs": inputs, **each}
    shown = sized(query, support)
    methods = {"predict": Method(predict, {"support": shown, "query": {"inputs": inputs}})}
    return task._replace(loss=loss, methods=methods, batch={"support": shown, "query": query})


def _named(inputs: Tree) -> str:
    return ", ".join(inputs) if isinstance(inputs, dict) else f"a {type(inputs).__name__}"


def _check_features(task: Task, features: Method, rows: tuple[int, ...], who: str, method: str) -> None:
    made = jax.eval_shape(features.apply, abstract_variables(task), abstract_batch(features.inputs), abstract_key())
    if not hasattr(made, "shape") or made.shape[:1] != rows:
        raise ValueError(f"{who}: method={method!r} gives {made}; allowed: one array [{rows[0]}, ...], features of each input")
