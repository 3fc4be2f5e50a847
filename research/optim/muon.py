"""Muon: momentum, orthogonalized by Newton-Schulz iterations, for the weight matrices of a network (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/); Liu et al. 2025 (arXiv 2502.16982) for weight decay and the "rms" scale.

    m <- b m + (1 - b) g                        momentum
    u  = b m + (1 - b) g  (Nesterov), or m
    x <- a_k x + (b_k A + c_k A A) x, A = x x^T, from x = u / |u|_F     for each coefficients k
    update = x times a scale of the shape

All matrices of one shape, transposed so that A is the smaller product, are one stack and go through one compiled iteration. On
a mesh each device iterates its own matrices of a stack, whole, as in distributed Muon (`research.optim._stacks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core.names import call_checked, choose
from research.core.tree import Path, joined, leaves_with_paths
from research.core.types import Array, Tree
from research.optim._stacks import over_matrices
from research.optim.groups import compiled, nearest_path

Coefficients = Sequence[Sequence[float]]

JORDAN = ((3.4445, -4.7750, 2.0315),)  # one iteration, repeated; 5 of them end with singular values from 0.68 to 1.13
# Amsel et al. 2025 (arXiv 2505.16932), degree 5, for singular values from 1e-3: as published, further iterations like the last
_AMSEL = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # rounding in bfloat16 may push a singular value above 1, where the first polynomials grow: p(x / 1.01) instead
POLAR_EXPRESS = (*((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _AMSEL[:-1]), _AMSEL[-1])

COEFFICIENTS: Mapping[str, Coefficients] = {"jordan": JORDAN, "polar_express": POLAR_EXPRESS}
NONE: Mapping[str, Any] = {}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# update scale of a matrix from `fan_in` to `fan_out`
SCALES: Mapping[str, Callable[[int, int], float]] = {
    "width": lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),  # Jordan et al.
    "rms": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),  # Liu et al., eq. 4: as large as AdamW's updates
    "spectral": lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),  # Yang et al. 2023 (arXiv 2310.17813, condition 1)
    "none": lambda fan_in, fan_out: 1.0,
}


def iterations(coefficients: str, steps: int) -> Coefficients:
    """`steps` triples (a, b, c) of a named choice; the last published one repeats."""
    if steps < 1:
        raise ValueError(f"optimizer.steps={steps}: Newton-Schulz takes at least 1 iteration")
    table = choose(COEFFICIENTS, coefficients, "optimizer.coefficients")
    return [table[min(i, len(table) - 1)] for i in range(steps)]


def orthogonalized(x: Array, coefficients: Coefficients, dtype: Any = jnp.float32) -> Array:
    """About U V^T of x = U S V^T: [m, n] with m <= n, float32; zeros stay zeros. Products take operands rounded to
    `dtype` and sum in float32."""

    def product(a: Array, b: Array, axis_b: int) -> Array:
        dimensions = (((1,), (axis_b,)), ((), ()))
        return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dimensions, preferred_element_type=jnp.float32)

    def iterate(x: Array, abc: Array) -> tuple[Array, None]:
        gram = product(x, x, 1)
        return abc[0] * x + product(abc[1] * gram + abc[2] * product(gram, gram, 0), x, 0), None

    x = x / jnp.maximum(jnp.linalg.norm(x), 1e-30)
    # scanned, which compiles in a fifth of the time and runs as fast as unrolled
    return jax.lax.scan(iterate, x, jnp.asarray(coefficients, jnp.float32))[0]


class Layout(NamedTuple):
    """How a leaf [..., *inputs, outputs] is matrices. `inputs` axes before the last are the inputs, those before them a
    batch of matrices; the outputs are cut into `parts` (widths), each a matrix of its own."""

    found: Callable[[Path], bool]
    pattern: str
    inputs: int
    parts: int | Sequence[int]


def layout(*, match: str, inputs: int = 1, parts: int | Sequence[int] = 1) -> Layout:
    """A Layout from plain values: `match` is searched in the path; `inputs` is 3 for a convolution's [height, width, in,
    out]; `parts` is how many equal parts, or their widths, such as 3 for fused query, key and value."""
    found = compiled(match, "layouts.match")
    return Layout(lambda path: bool(found.search(joined(path))), match, inputs, parts)


PLAIN = Layout(lambda path: True, "", 1, 1)


def _widths(name: str, shape: Sequence[int], own: Layout) -> list[int]:
    if len(shape) < own.inputs + 1:
        raise ValueError(f"muon: {name} {tuple(shape)} is no matrix of {own.inputs} input axes and one of outputs")
    if isinstance(own.parts, int):
        if own.parts < 1 or shape[-1] % own.parts:
            raise ValueError(f"muon: {name} {tuple(shape)}: {shape[-1]} outputs do not divide into {own.parts} parts")
        return [shape[-1] // own.parts] * own.parts
    if sum(own.parts) != shape[-1]:
        raise ValueError(f"muon: {name} {tuple(shape)}: parts {tuple(own.parts)} do not add up to {shape[-1]} outputs")
    return list(own.parts)


class _Piece(NamedTuple):
    """One part of one leaf: its matrices [batch, short, long], turned over where the leaf's have more rows than columns."""

    leaf: int
    turned: bool
    matrices: Array


def _pieces(leaf: int, name: str, x: Array, own: Layout) -> list[_Piece]:
    widths = _widths(name, x.shape, own)
    x_BxIxO = x.reshape(-1, math.prod(x.shape[-1 - own.inputs : -1]), x.shape[-1])
    out = []
    for part_BxIxO in jnp.split(x_BxIxO, [sum(widths[:k]) for k in range(1, len(widths))], axis=-1):
        turned = part_BxIxO.shape[1] > part_BxIxO.shape[2]
        out.append(_Piece(leaf, turned, jnp.swapaxes(part_BxIxO, 1, 2) if turned else part_BxIxO))
    return out


def each_matrix(
    f: Callable[[Array], Array], scale: Callable[[int, int], float], tree: Tree, layouts: Sequence[Layout], at_once: int | None
) -> Tree:
    """Every matrix of the tree as `f` makes it, times `scale(fan in, fan out)`; `f` sees [m, n] with m <= n. Matrices of
    equal shape are stacked and compiled once, `at_once` of them in one batched call (`research.optim._stacks`)."""
    leaves, structure = jax.tree.flatten(tree)
    pieces: list[_Piece] = []
    for i, (path, leaf) in enumerate(leaves_with_paths(tree)):
        own = next(own for own in (*layouts, PLAIN) if own.found(path))
        pieces += _pieces(i, joined(path), leaf, own)
    parts = over_matrices(f, [[piece.matrices] for piece in pieces], at_once)
    done: dict[int, list[Array]] = {i: [] for i in range(len(leaves))}
    for (leaf, turned, _), own_part in zip(pieces, parts, strict=True):
        part = jnp.swapaxes(own_part, 1, 2) if turned else own_part
        done[leaf].append(part * scale(part.shape[1], part.shape[2]))
    back = [jnp.concatenate(done[i], axis=-1).reshape(x.shape) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, back)


def scale_by_muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    coefficients: str = "jordan",
    steps: int = 5,
    scale: str = "width",
    dtype: str = "bfloat16",
    at_once: int | None = None,
    layouts: Mapping[str, Mapping[str, Any]] = NONE,
) -> optax.GradientTransformation:
    """Muon for a tree in which every leaf is a matrix or a batch of them; `muon` gives the other leaves to AdamW.

    coefficients, steps: of the iteration, from COEFFICIENTS. scale: of the update by the matrix's shape, from SCALES.
    dtype: of the operands of its products. at_once: how many matrices of a shape go through one batched product; None is
    all of them on an accelerator, 1 on a CPU, whose cache holds one better. layouts: {name: keywords of `layout`}, the first
    by name that matches; elsewhere the last two
    axes are a matrix [inputs, outputs] and those before them a batch. State: {"momentum"} shaped as params, float32 (or
    wider).

    Raises ValueError on an unknown name, and where a leaf is no matrix or a layout matches nothing.
    """
    table = iterations(coefficients, steps)
    low = choose(DTYPES, dtype, "optimizer.dtype")
    sized = choose(SCALES, scale, "optimizer.scale")
    own = [call_checked(layout, dict(layouts[name]), f"optimizer.layouts.{name}") for name in sorted(layouts)]

    def init(params: Tree) -> dict[str, Tree]:
        paths = leaves_with_paths(params)
        for given in own:
            if not any(given.found(path) for path, _ in paths):
                near = nearest_path(given.pattern, [joined(path) for path, _ in paths])
                raise ValueError(f"optimizer.layouts.match={given.pattern!r} matches no matrix{near}")
        for path, x in paths:
            _widths(joined(path), x.shape, next(o for o in (*own, PLAIN) if o.found(path)))
        return {"momentum": jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)}

    def update(updates: Tree, state: dict[str, Tree], params: Tree | None = None):
        del params
        moved = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state["momentum"], updates)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, moved, updates) if nesterov else moved
        return each_matrix(lambda x: orthogonalized(x, table, low), sized, ahead, own, at_once), {"momentum": moved}

    return optax.GradientTransformation(init, update)
