"""Evaluators: what is measured on whole data sets, exactly, however they are batched and padded."""

from research.evals._values import absolute_error, correct, nll, squared_error
from research.evals.accuracy import accuracy
from research.evals.auc import auc
from research.evals.bits_per_byte import bits_per_byte
from research.evals.bootstrap import bootstrap
from research.evals.collect import collect
from research.evals.confusion_matrix import confusion_matrix
from research.evals.episode_accuracy import episode_accuracy, nearest_neighbour
from research.evals.mean import mean
from research.evals.mean_of_loss import mean_of_loss

__all__ = [
    "absolute_error",
    "accuracy",
    "auc",
    "bits_per_byte",
    "bootstrap",
    "collect",
    "confusion_matrix",
    "correct",
    "episode_accuracy",
    "mean",
    "mean_of_loss",
    "nearest_neighbour",
    "nll",
    "squared_error",
]
