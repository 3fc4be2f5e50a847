"""The oracle itself: its gradients are its values'."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pallas_kernels.attention import cases, oracle


@pytest.mark.parametrize("softcap, mod", [(None, None), (1.5, "learned")])
def test_the_oracles_gradients_are_the_slopes_of_its_values(softcap, mod):
    small = cases.Case(["causal"], q_len=3, kv_len=4, d_qk=2, d_v=3, batch=1, q_heads=2, kv_heads=1)
    case = small._replace(sinks=mod is not None, softcap=softcap, mod=mod)
    generator = np.random.default_rng(0)
    arrays = {name: x.astype(np.float64) for name, x in cases.arrays(case).items()}
    seen = cases.seen(case)
    weights = generator.standard_normal((1, 3, 2, 3)), generator.standard_normal((1, 3, 2))

    def loss(of):
        values = oracle.attention(seen, of, weights, softcap=softcap, mod=oracle.MODS.get(mod)).values
        return sum((x * w).sum() for x, w in zip(values, weights, strict=True))

    gradients = oracle.attention(seen, arrays, weights, softcap=softcap, mod=oracle.MODS.get(mod)).gradients
    for name, x in arrays.items():
        for index in np.ndindex(*x.shape):
            step = np.zeros(x.shape)
            step[index] = 1e-6
            slope = (loss({**arrays, name: x + step}) - loss({**arrays, name: x - step})) / 2e-6
            assert abs(slope - gradients[name][index]) < 1e-7, (name, index)
