"""Model and loss as a Task; and `generate`, which samples from a language model."""

from research.tasks.classification import classification
from research.tasks.generate import check_request, generate
from research.tasks.hypernetwork import hypernetwork
from research.tasks.influence_balancing import influence_balancing
from research.tasks.language_model import language_model
from research.tasks.learned_activation import learned_activation
from research.tasks.neural_process import neural_process
from research.tasks.regression import regression

__all__ = [
    "check_request",
    "classification",
    "generate",
    "hypernetwork",
    "influence_balancing",
    "language_model",
    "learned_activation",
    "neural_process",
    "regression",
]
