"""What every kernel of `pallas_kernels` is held to, whatever it computes and on whichever backend.

A kernel joins with a `Kernel`: named cases, an oracle apart from its reference, and how it is called. Values and gradients are
then compared here, with the tolerances that stand here and nowhere else.

Errors are measured against the largest entry of the array that they are in. Sums round in proportion to the largest terms that
go into them, not to what is left after these cancel: an entry near zero beside entries near one carries the error of a sum of
terms near one, and would fail a tolerance relative to itself without being wrong; and a tolerance that takes no notice of the
magnitude would let an array of tiny entries be anything. An array that is zero in exact arithmetic (the gradient of a query
that sees one key) still holds the rounding of what cancelled in it, so the measure is at least a hundredth of the largest entry
of the arrays beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORWARD, GRADIENTS = 2e-5, 1e-4  # float32
PLAIN = 2  # bfloat16: times plain JAX's own bfloat16 error, both against the oracle
HALF_UNIT = 2.0**-9  # of bfloat16, relative: what storing a result in it costs, which plain JAX may have been spared by luck


class Results(NamedTuple):
    """Of one call. values: a tree, what is returned. gradients: by the name of the operand."""

    values: Any
    gradients: Any


class Kernel(NamedTuple):
    """How a kernel joins. A case is anything that the four functions know.

    cases: by name. arrays(case): the operands that are differentiated, float32 NumPy by name. call(case, implementation): the
    function of those arrays (a dict) that is to be checked. oracle(case, arrays, cotangents): Results in float64, not by JAX.
    """

    cases: Mapping[str, Any]
    arrays: Callable[[Any], dict[str, np.ndarray]]
    call: Callable[[Any, str | None], Callable[[dict[str, Any]], Any]]
    oracle: Callable[[Any, dict[str, np.ndarray], Any], Results]


def cotangents(values: Any, seed: int = 0) -> Any:
    """A normal array beside each of a tree of (shapes of) values, equal for equal shapes, of their dtypes."""
    leaves, tree = jax.tree.flatten(values)
    drawn = [np.random.default_rng([seed, i]).standard_normal(x.shape).astype(jnp.dtype(x.dtype)) for i, x in enumerate(leaves)]
    return tree.unflatten(drawn)


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ALL = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def compiled(function: Callable[..., Any], quick: bool = True) -> Callable[..., Any]:
    """jax.jit. quick: without LLVM's optimizations, which take half of the time of a small case; what XLA itself does is the
    same."""
    return jax.jit(function, compiler_options=QUICK if quick else ALL)


def runner(function: Callable[..., Any], quick: bool = True) -> Callable[..., Results]:
    """The compiled function of (arrays, …), with gradients by the arrays under `cotangents`."""

    def both(arrays, *data):
        values, pull = jax.vjp(lambda arrays: function(arrays, *data), arrays)
        return Results(values, pull(cotangents(values))[0])

    jitted = compiled(both, quick)
    return lambda *arguments: jitted(*jax.tree.map(jnp.asarray, arguments))


def results(function: Callable[[Any], Any], arrays: Any, quick: bool = True) -> Results:
    """Values, and gradients under `cotangents`, of the compiled function."""
    return runner(function, quick)(arrays)


def same_results(got: Results, expected: Results, forward: float = FORWARD, gradients: float = GRADIENTS) -> None:
    """Values and gradients agree within the tolerances."""
    same(got.values, expected.values, forward, "values")
    same(got.gradients, expected.gradients, gradients, "gradients")


def same(got: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Trees agree: shapes, where there are infinities and NaN, and all else within the tolerance times the magnitude."""
    for name, error, magnitude in _errors(got, expected, what):
        assert error <= tolerance * magnitude, f"{name}: error {error:.3g}, {tolerance * magnitude:.3g} allowed"


def as_plain(got: Results, plain: Results, exact: Results) -> None:
    """Every array's error is at most twice that which plain JAX makes in the same dtype."""
    for part, mine, theirs, true in zip(Results._fields, got, plain, exact):
        pairs = zip(_errors(mine, true, part), _errors(theirs, true, part))
        for (name, error, magnitude), (_, usual, _) in pairs:
            most = PLAIN * max(usual, HALF_UNIT * magnitude)
            assert error <= most, f"{name}: error {error:.3g}; plain JAX's is {usual:.3g}"


def _errors(got: Any, expected: Any, what: str) -> list[tuple[str, float, float]]:
    """(name, largest error, magnitude) of every leaf."""
    pairs = _named(got, what), _named(expected, what)
    assert list(pairs[0]) == list(pairs[1]), f"{what}: got {list(pairs[0])}, wanted {list(pairs[1])}"
    largest = {name: np.abs(np.where(np.isfinite(x), x, 0)).max(initial=0) for name, x in pairs[1].items()}
    found = []
    for name, mine in pairs[0].items():
        theirs = pairs[1][name]
        assert mine.shape == theirs.shape, f"{name}: got shape {mine.shape}, wanted {theirs.shape}"
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(np.where(finite, 0, mine), np.where(finite, 0, theirs), f"{name}: where it is not finite")
        assert np.isfinite(mine[finite]).all(), f"{name}: not finite at {np.argwhere(finite & ~np.isfinite(mine))[:4].tolist()}"
        error = np.abs(np.where(finite, mine, 0) - np.where(finite, theirs, 0)).max(initial=0)
        found.append((name, float(error), float(max(largest[name], max(largest.values()) / 100))))
    return found


def _named(tree: Any, what: str) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {what + jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in leaves}


def identical(got: Any, expected: Any) -> None:
    """Bit for bit."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def in_dtype(arrays: dict[str, np.ndarray], dtype: Any) -> dict[str, Any]:
    return {name: jnp.asarray(x).astype(dtype) for name, x in arrays.items()}


def exact(kernel: Kernel, case: Any, arrays: dict[str, Any], values: Any) -> Results:
    """The oracle on these very operands, under the cotangents of these values."""
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    return kernel.oracle(case, wide, jax.tree.map(lambda x: np.asarray(x, np.float64), cotangents(values)))


def equals_oracle(kernel: Kernel, case: Any, got: Results) -> None:
    """float32 values and gradients of a case are the oracle's."""
    same_results(got, exact(kernel, case, kernel.arrays(case), got.values))


def of_reference(kernel: Kernel, case: Any) -> Results:
    """What others are compared with."""
    return results(kernel.call(case, "reference"), kernel.arrays(case))


def equals(kernel: Kernel, case: Any, implementation: str | None, expected: Results, quick: bool = True) -> None:
    """float32 values and gradients are these."""
    same_results(results(kernel.call(case, implementation), kernel.arrays(case), quick), expected)


def rounds_as_plain(kernel: Kernel, case: Any, implementation: str | None, plain: Callable[[dict[str, Any]], Any]) -> None:
    """bfloat16 values and gradients are at most twice as far from the oracle's as those of `plain`, JAX's own function."""
    arrays = in_dtype(kernel.arrays(case), jnp.bfloat16)
    got = results(kernel.call(case, implementation), arrays, quick=False)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got.gradients))
    as_plain(got, results(plain, arrays, quick=False), exact(kernel, case, arrays, got.values))
