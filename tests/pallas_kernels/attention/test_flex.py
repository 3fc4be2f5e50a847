"""PyTorch's FlexAttention as an oracle from outside: on mask_mods that a grammar composes at random, written for both sides.

Values only: FlexAttention has no gradients on CPU (it raises NotImplementedError for operands that require them).
"""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import masks, sparse_attention
from tests.pallas_kernels.attention import flex_grammar
from tests.pallas_kernels.attention.implementations import ALL
from tests.pallas_kernels.kernel_base import FORWARD, same

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def torchs(tmp_path_factory):
    """FlexAttention's results on all cases, by name. It needs .venv-peers, which `make .venv-peers` makes."""
    if not PYTHON.exists():
        pytest.skip("there is no .venv-peers, with torch in it; make .venv-peers makes it")
    folder = tmp_path_factory.mktemp("flex")
    (folder / "cases.json").write_text(json.dumps(CASES))
    script = Path(__file__).with_name("flex.py")
    done = subprocess.run([PYTHON, "-I", script, folder / "cases.json", folder / "out.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "out.npz")


def drawn(number: int) -> dict:
    """A mask, lengths, heads, offset and a score_mod or none."""
    chance = random.Random(number)
    q_len, kv_len, offset = chance.choice([(40, 40, 0), (40, 40, 0), (17, 40, 23), (40, 23, 0), (1, 40, 39)])
    kv_heads = chance.choice([1, 2, 4])
    return {
        "spec": flex_grammar.drawn(chance, depth=3),
        "offset": offset,
        "slopes": [chance.uniform(-0.2, 0.2) for _ in range(4)] if chance.random() < 0.4 else None,
        "q": (2, q_len, 4, 8),
        "k": (2, kv_len, kv_heads, 8),
        "v": (2, kv_len, kv_heads, 8),
    }


CASES = [drawn(number) for number in range(30)]


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("implementation", [name for name in ALL if name in ("reference", "xla")])
def test_the_result_is_flexattentions(torchs, implementation, number):
    """Of the mask_mod as it stands, and of the log-sum-exp, -inf for rows that see nothing."""
    case = CASES[number]
    generator = np.random.default_rng(number)
    q, k, v = (generator.standard_normal(case[name]).astype(np.float32) for name in "qkv")
    score_mod = None
    if case["slopes"] is not None:
        slopes = jnp.array(case["slopes"], jnp.float32)
        score_mod = lambda score, b, h, q, kv: score + slopes[h] * (q - kv)  # noqa: E731
    mask = masks.from_function(flex_grammar.mask_mod(case["spec"]))
    got = sparse_attention(
        q, k, v, mask, q_offset=case["offset"], score_mod=score_mod, return_lse=True, implementation=implementation
    )
    same(got, (torchs[f"out{number}"], torchs[f"lse{number}"]), FORWARD)


def test_the_grammar_draws_what_is_worth_comparing():
    """No mask is all or nothing, all kinds occur, some rows see nothing, and heads and sequences are told apart."""
    kinds, densities, blind = set(), [], 0
    for case in CASES:
        kinds |= flex_grammar.kinds(case["spec"])
        i = np.ogrid[:2, :4, : case["q"][1], : case["k"][1]]
        seen = np.asarray(masks.from_function(flex_grammar.mask_mod(case["spec"]))(i[0], i[1], i[2] + case["offset"], i[3]))
        densities.append(seen.mean())
        blind += not seen.any(-1).all()
    assert kinds == {*flex_grammar.LEAVES, "and", "or", "not"}
    assert blind >= 3 and sum(0.02 < density < 0.98 for density in densities) >= 25
