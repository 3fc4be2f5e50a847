"""How a State moves: `Learner`s, and what turns one into another."""

from research.learners.after_step import after_step
from research.learners.average import average
from research.learners.evolution import evolution
from research.learners.forward import forward
from research.learners.game import game
from research.learners.gradient import gradient
from research.learners.lookahead import lookahead
from research.learners.members import members
from research.learners.pbt import Score, loss_as_score, pbt
from research.learners.population import population
from research.learners.skip_nonfinite import skip_nonfinite

__all__ = [
    "Score",
    "after_step",
    "average",
    "evolution",
    "forward",
    "game",
    "gradient",
    "lookahead",
    "loss_as_score",
    "members",
    "pbt",
    "population",
    "skip_nonfinite",
]
