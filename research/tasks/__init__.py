"""Model and loss as a Task; and `generate`, which samples from a language model."""

from research.tasks.classification import classification
from research.tasks.generate import check_request, generate
from research.tasks.language_model import language_model
from research.tasks.regression import regression

__all__ = ["check_request", "classification", "generate", "language_model", "regression"]
