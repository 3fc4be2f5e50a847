"""Many matrices at once: each as if alone, and on a mesh each on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.collectives import collectives, totals
from research.core.mesh import entered, make_layout
from research.optim import make
from research.optim._stacks import over_matrices

SHAPES = {"a": (3, 4, 6), "b": (4, 6), "c": (5, 5), "d": (2, 1, 4, 6)}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in SHAPES.values()]


def gram(x, y):
    return {"product": x @ y.T, "trace": (x * y).sum()[None, None]}


@pytest.mark.parametrize("at_once", [1, 2, 100])
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_each_matrix_is_treated_as_if_alone(at_once, sizes):
    groups = list(zip(arrays(0), arrays(1)))
    with entered(make_layout(sizes)):
        found = jax.jit(lambda groups: over_matrices(gram, groups, at_once))(groups)
    for (x, y), own in zip(groups, found, strict=True):
        np.testing.assert_allclose(own["product"], np.einsum("...ij,...kj->...ik", x, y), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(own["trace"][..., 0, 0], np.einsum("...ij,...ij->...", x, y), rtol=1e-5, atol=1e-6)


def test_muon_on_eight_devices_gathers_nothing_and_moves_each_matrix_twice():
    """Rows are laid over fsdp, 5 matrices of one shape: all to all once there and once back, whatever the iterations."""
    layout = make_layout({"fsdp": 8})
    rows = jax.NamedSharding(layout.mesh, jax.P("fsdp"))
    params = {str(i): jnp.sin((i + 1) * jnp.arange(512.0)).reshape(16, 32) for i in range(5)}
    tx = make({"name": "muon", "learning_rate": 0.1, "dtype": "float32"}, steps=10)
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    laid = jax.tree.map(lambda x: jax.device_put(x, rows), params)
    with entered(layout):
        compiled = jax.jit(tx.update, out_shardings=(rows, None)).lower(laid, jax.jit(tx.init)(laid), laid).compile()
        found, _ = compiled(laid, jax.jit(tx.init)(laid), laid)
    counts = totals(collectives(compiled.as_text()))
    assert set(counts) == {"all-to-all"} and counts["all-to-all"].runs <= 3, counts
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), found, expected)
