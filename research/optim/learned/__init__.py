"""Optimizers that are learned: `LearnedOptimizer`s by name, and what a run has learned, as an optax transformation.

Each is trained as the params of `transforms.unroll`; a run whose config has the section `learned_optimizer` keeps which one it
is beside its theta, and `optimizer = {"name": "learned", "path": <its workdir>, …}` uses it anywhere.
"""

from research.optim.learned.mlp import per_parameter_mlp
from research.optim.learned.preconditioner import neural_preconditioner
from research.optim.learned.rnn import coordinatewise_rnn
from research.optim.learned.saved import LEARNED, Restored, carried, learned_optimizer, restored
from research.optim.learned.scales import learned_scales

__all__ = [
    "LEARNED",
    "Restored",
    "carried",
    "coordinatewise_rnn",
    "learned_optimizer",
    "learned_scales",
    "neural_preconditioner",
    "per_parameter_mlp",
    "restored",
]
