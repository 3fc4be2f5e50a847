"""Language models: text, a model of tokens, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.names import choose
from research.core.types import Evaluation, Key, Task, Variables
from research.data import stdlib
from research.data.compress import compressed_bits_per_byte
from research.data.streams import ordered_batches, subset, train_batches
from research.data.text import Corpus, text_corpora
from research.data.windows import random_windows, scored_windows
from research.evals import bits_per_byte
from research.experiment.parts import Parts, Table, Text
from research.experiment.sections import arguments, called, only
from research.models import MODELS
from research.tasks import check_request, generate, language_model


def _standard_library() -> dict[str, Corpus]:
    return stdlib.splits()


TEXTS: Mapping[str, Callable[..., dict[str, Corpus]]] = {"stdlib": _standard_library, "files": text_corpora}


def language(config: Any) -> Parts:
    """The language model of `config.model` on the text of `config.data`.

    config.stream: {batch, length}, windows a step and tokens a window.
    config.evaluate: {every, batch, length, context, windows}. "val" and "test" score every token of their split once, after the
        last step, in windows of `length` with at least `context` tokens before a scored one (but at the beginning). "val_part"
        does so for `windows` windows of the validation split, evenly apart, every `every` steps.
    config.sample: {prompt, tokens, temperature, top_k}. config.closing: what to show at the end, of "compressors" and "sample".
    """
    only(config.stream, ("batch", "length"), "stream")
    only(config.evaluate, ("every", "batch", "length", "context", "windows"), "evaluate")
    only(config.sample, ("prompt", "tokens", "temperature", "top_k"), "sample")
    corpora = called(TEXTS, config.data, "data")
    train, validation, test = (corpora[k] for k in ("train", "validation", "test"))
    model = called(MODELS, config.model, "model", vocab=train.vocab_size)
    batch, length = config.stream.batch, config.stream.length
    task = called(TASKS, config.task, "task", model, batch=batch, length=length)
    windows = random_windows(train, length, seed=config.seed)

    def measured(corpus: Corpus, every: int, windows: int | None) -> Evaluation:
        source = scored_windows(corpus, config.evaluate.length, config.evaluate.context)
        if windows is not None:
            source = subset(source, np.unique(np.linspace(0, len(source) - 1, windows).round().astype(int)))
        evaluator = bits_per_byte(task.methods["predict"].apply, bytes_per_token=corpus.bytes_per_token)
        return Evaluation(evaluator, ordered_batches(source, config.evaluate.batch), every)

    evaluations = {"val": measured(validation, 0, None), "test": measured(test, 0, None)}
    if config.evaluate.every:
        evaluations = {"val_part": measured(validation, config.evaluate.every, config.evaluate.windows), **evaluations}
    if config.evaluate.every and config.evaluate.windows < 1:
        raise ValueError(f"evaluate.windows={config.evaluate.windows}; allowed: 1 or more")
    if "sample" in config.closing:
        check_request(task.methods["decode"], len(prompt_of(config.sample.prompt, train)), **arguments(config.sample, "prompt"))
    sample = partial(sampled, task, train, config.sample)
    closings = {
        "compressors": partial(compared, test, [train, validation]),
        "sample": lambda variables, results, key: [Text("A sample", sample(variables, key, 1)[0])],
    }
    return Parts(
        task,
        train_batches(windows, batch, seed=config.seed, remainder="drop"),
        evaluations,
        {"tokens": batch * length},
        [choose(closings, name, "closing") for name in config.closing],
        sample,
        ("val_part/bits_per_byte", "val/bits_per_byte"),
        {"bits/byte": lambda metrics: metrics["nll"] / (math.log(2) * train.bytes_per_token)},
    )


TASKS: Mapping[str, Callable[..., Task]] = {"language_model": language_model}


def prompt_of(text: str, corpus: Corpus) -> np.ndarray:
    """Tokens of a prompt, [length]; the corpus's first token for an empty one."""
    return corpus.tokenizer.encode(text.encode()) if text else np.array([corpus.start])


def sampled(task: Task, corpus: Corpus, options: Any, variables: Variables, key: Key, count: int) -> list[str]:
    """`count` texts that go on from `options.prompt`."""
    prompt = prompt_of(options.prompt, corpus)
    tokens = generate(
        task.methods["decode"],
        variables,
        jnp.tile(jnp.asarray(prompt, jnp.int32)[None], (count, 1)),
        key,
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
    )
    return [options.prompt + corpus.decode(row).decode("utf-8", "replace") for row in np.asarray(jax.device_get(tokens))]


def compared(test: Corpus, others: Sequence[Corpus], variables: Variables, results: Mapping[str, Any], key: Key) -> list[Table]:
    """Bits per byte of the test split, ours beside general compressors', on the same bytes."""
    content = test.decode(test.tokens)
    found = compressed_bits_per_byte(content, b"".join(c.decode(c.tokens) for c in others))
    rows = [("this model", results["test/bits_per_byte"]), *found.items()]
    rows.sort(key=lambda row: -row[1])
    title = f"Bits per byte of the test split ({len(content):,} bytes, each counted once)"
    return [Table(title, ("compressor", "bits per byte"), [(name, f"{value:.4f}") for name, value in rows])]
