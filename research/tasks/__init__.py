"""Model and loss as a Task."""

from research.tasks.classification import classification
from research.tasks.language_model import language_model

__all__ = ["classification", "language_model"]
