"""Trajectories of other people's optimizers on a fixed problem, kept in references.npz beside this file.

    .venv-peers/bin/python -m tests.optim.references          # makes references.npz anew; the tests need neither it nor torch

Made by pytorch_optimizer 4.1.0 with torch 2.13.0 (requirements/peers.txt), an implementation apart from ours: SOAP, Shampoo,
ScalableShampoo and Kron. An array "case/parameter" [steps + 1, *shape] is the parameter before each step and after the last.

The problem: for each parameter p with target c, gradient(p, t) = M (p - c) N + 0.3 cos(grid * (t + 1)), M and N positive
definite, so that gradients depend on the trajectory and statistics are of full rank where p is square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".npz")
STEPS, RATE = 12, 0.05
SHAPES = {"bias": (5,), "blocks": (8, 8), "square": (6, 6), "tall": (7, 4), "wide": (6, 9)}

SOAP = {"b1": 0.9, "b2": 0.95, "b_statistics": 0.9, "every": 3, "largest": 8}
CASES = {
    "soap": ("bias", "square", "tall", "wide"),
    "shampoo": ("square", "tall"),
    "shampoo_blocks": ("bias", "wide"),
    "shampoo_adagrad": ("bias", "wide"),
    "shampoo_stale": ("blocks",),
    "psgd_kron": ("bias", "square", "tall", "wide"),
}
FIT_PROBABILITY = 0.4  # of PSGD: fits fall on every third step


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng([sorted(SHAPES).index(name), 7])


def start(name: str) -> np.ndarray:
    return _generator(name).standard_normal(SHAPES[name])


def gradient(name: str, p: np.ndarray, t: int) -> np.ndarray:
    """float64, of the parameter [*SHAPES[name]] before step t, counted from 0."""
    shape = SHAPES[name]
    rng = _generator(name)
    rng.standard_normal(shape)
    target = rng.standard_normal(shape)
    m, n = shape[0], int(np.prod(shape[1:]))

    def definite(size: int) -> np.ndarray:
        x = rng.standard_normal((size, size))
        return x @ x.T / size + 0.1 * np.eye(size)

    pull = definite(m) @ (p - target).reshape(m, n) @ definite(n)
    grid = np.arange(1.0, p.size + 1).reshape(shape) ** 1.3
    return pull.reshape(shape) + 0.3 * np.cos(grid * (t + 1))


def draws(name: str, number: int) -> np.ndarray:
    """PSGD's V [STEPS, *shape] of a parameter, by its number among the case's."""
    return np.random.default_rng([number, 11]).standard_normal((STEPS, *SHAPES[name])).astype(np.float32)


def run(names: Sequence[str], move: Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{name: [STEPS + 1, *shape]}: `move(gradients, t)` gives the parameters after step t."""
    params = {name: start(name) for name in names}
    seen = {name: [p.copy()] for name, p in params.items()}
    for t in range(STEPS):
        params = move({name: gradient(name, np.asarray(p, np.float64), t) for name, p in params.items()}, t)
        for name, p in params.items():
            seen[name].append(np.array(p))
    return {name: np.stack(each) for name, each in seen.items()}


def main() -> None:
    import torch
    from pytorch_optimizer import SOAP as TheirSOAP
    from pytorch_optimizer import Kron, ScalableShampoo, Shampoo

    class Case:
        def __init__(self, case: str, make, dtype=torch.float64):
            self.names = CASES[case]
            self.params = {n: torch.nn.Parameter(torch.tensor(start(n), dtype=dtype)) for n in self.names}
            self.optimizer = make(list(self.params.values()))
            self.first_bases: dict[str, np.ndarray] = {}

        def __call__(self, gradients, t):
            for name, g in gradients.items():
                self.params[name].grad = torch.tensor(g, dtype=self.params[name].dtype)
            self.optimizer.step()
            if t == 0:
                for name, p in self.params.items():
                    for i, q in enumerate(self.optimizer.state[p].get("Q") or ()):
                        if len(q):
                            self.first_bases[f"{name}/{i}"] = q.numpy().copy()
            return {name: p.detach().numpy() for name, p in self.params.items()}

    def scalable(graft: int, block: int, every: int):
        def make(params):
            made = ScalableShampoo(
                params, lr=RATE, betas=(0.8, 0.95), moving_average_for_momentum=True, start_preconditioning_step=1,
                preconditioning_compute_steps=every, block_size=block, shape_interpretation=False, graft_type=graft,
                nesterov=False, matrix_eps=1e-13, use_svd=True,
            )  # fmt: skip
            made.param_groups[0]["step"] = every - 1  # so that roots are computed at the first step, as ours are
            return made

        return make

    out = {}

    def keep(case: str, one: Case) -> None:
        out.update({f"{case}/{name}": x for name, x in run(one.names, one).items()})

    soap = Case(
        "soap",
        lambda params: TheirSOAP(
            params, lr=RATE, betas=(SOAP["b1"], SOAP["b2"]), shampoo_beta=SOAP["b_statistics"], weight_decay=0.0,
            precondition_frequency=SOAP["every"], max_precondition_dim=SOAP["largest"],
        ),
    )  # fmt: skip
    keep("soap", soap)
    # The null space of a first statistic, of a parameter that is not square, has no basis of its own: tests begin with theirs.
    out.update({f"soap_basis/{name}": q for name, q in soap.first_bases.items() if name.startswith("tall")})
    keep("shampoo", Case("shampoo", lambda params: Shampoo(params, lr=RATE, matrix_eps=1e-12)))
    keep("shampoo_blocks", Case("shampoo_blocks", scalable(3, 4, 1)))
    keep("shampoo_adagrad", Case("shampoo_adagrad", scalable(2, 4, 1)))
    keep("shampoo_stale", Case("shampoo_stale", scalable(3, 4, 3)))

    kron = Case(
        "psgd_kron",
        lambda params: Kron(
            params, lr=RATE, momentum=0.9, pre_conditioner_update_probability=FIT_PROBABILITY, max_size_triangular=8,
            balance_prob=0.0,
        ),
        torch.float32,
    )  # fmt: skip
    queue: list[torch.Tensor] = []
    torch.randn_like = lambda *args, **kwargs: queue.pop(0)

    def fed(gradients, t):
        queue[:] = [torch.from_numpy(draws(name, i)[t]) for i, name in enumerate(kron.names)]
        return kron(gradients, t)

    out.update({f"psgd_kron/{name}": x for name, x in run(kron.names, fed).items()})
    np.savez_compressed(FILE, **out)
    print(f"{FILE.name}: {len(out)} arrays, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
