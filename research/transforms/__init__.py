"""Transforms: Task -> Task."""

from research.transforms import _augmentations as augmentations
from research.transforms.augment import augment
from research.transforms.distill import distill, teach
from research.transforms.mixture import mixture
from research.transforms.over_tasks import over_tasks

__all__ = ["augment", "augmentations", "distill", "mixture", "over_tasks", "teach"]
