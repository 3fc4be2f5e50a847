"""The derivative of a minimum by what it is the minimum for: the implicit function theorem, the Hessian never formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from research.core.types import Tree

Matvec = Callable[[Tree], Tree]
Solver = Callable[[Matvec, Tree], Tree]
EXACT = 1e-10  # of the right-hand side's norm, where conjugate gradients stop early


def conjugate_gradients(iterations: int, rate: float) -> Solver:
    """H^-1 b by `iterations` of the method of conjugate gradients, for a positive definite H; `rate` is not used."""
    return lambda matvec, b: jax.scipy.sparse.linalg.cg(matvec, b, tol=EXACT, maxiter=iterations)[0]


def neumann_series(iterations: int, rate: float) -> Solver:
    """rate sum_{i < iterations} (1 - rate H)^i b, which tends to H^-1 b where 0 < rate H < 2 (Lorraine et al. 2020, arXiv
    1911.02590, section 4)."""

    def solve(matvec: Matvec, b: Tree) -> Tree:
        def add(carry: tuple[Tree, Tree], _: None) -> tuple[tuple[Tree, Tree], None]:
            term, total = carry
            term = jax.tree.map(lambda t, h: t - rate * h, term, matvec(term))
            return (term, jax.tree.map(jnp.add, total, term)), None

        (_, total), _ = jax.lax.scan(add, (b, b), None, iterations - 1)
        return jax.tree.map(lambda t: rate * t, total)

    return solve


SOLVERS: Mapping[str, Callable[[int, float], Solver]] = {"cg": conjugate_gradients, "neumann": neumann_series}


def as_minimum(gradient: Callable[[Tree], Tree], found: Tree, solver: Solver) -> Tree:
    """`found`, with the derivative that it has by all that `gradient` closes over if gradient(found) = 0: -H^-1 dgradient, H
    the derivative of `gradient` at `found`, which is symmetric. Its own derivative by how it was found is not taken."""

    def symmetric(matvec: Matvec, b: Tree) -> Tree:
        return jax.lax.custom_linear_solve(matvec, b, solver, symmetric=True)

    return jax.lax.custom_root(gradient, jax.lax.stop_gradient(found), lambda _, x: x, symmetric)


def check_solver(who: str, iterations: int, rate: float) -> None:
    if iterations < 1:
        raise ValueError(f"{who}: iterations={iterations}; allowed: 1 or more")
    if not rate > 0:
        raise ValueError(f"{who}: rate={rate}; allowed: above 0")
