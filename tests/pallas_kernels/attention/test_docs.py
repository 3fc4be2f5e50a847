"""The examples of docs/attention.md run, and are what the words beside them say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import SelectedBlocks, masks, sparse_attention
from tests.pallas_kernels.kernel_base import FORWARD, same

PAGE = (Path(__file__).parents[3] / "docs" / "attention.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_run_one_after_another():
    """On operands that are drawn, where the page has ones."""
    ones = "q = k = v = jnp.ones((1, 1024, 8, 64))"
    assert len(EXAMPLES) == 5 and ones in EXAMPLES[0]
    drawn = "q, k, v = (jax.random.normal(key, (1, 1024, 8, 64)) for key in jax.random.split(jax.random.key(0), 3))"
    scope: dict[str, Any] = {}
    with jax.numpy_rank_promotion("allow"):  # as it is for everybody
        for example in EXAMPLES:
            exec(example.replace(ones, drawn), scope)
            whole = scope.setdefault("whole", scope["out"])
    q, k, v = (scope[name] for name in "qkv")
    same(scope["one"], whole[:, 699:700], FORWARD)
    best = np.asarray(scope["best"])
    assert best.shape == (1, 8, 8, 2) and (best[:, :, 0] == [0, -1]).all() and (best[:, :, 1:] >= 0).all()
    assert isinstance(scope["selected"], SelectedBlocks) and scope["gradient"].shape == (8,)
    seen = masks.window(63, 0) | (masks.causal() & masks.strided(64))
    last = (x[:, :, 7:] for x in (q, k, v))
    same(scope["out"][:, :, 7:], sparse_attention(*last, seen, implementation="reference"), FORWARD)
    assert jnp.isfinite(scope["gradient"]).all()
