"""How a gradient is computed: `Estimate`s, which wrap each other."""

from research.estimates.accumulated import accumulated
from research.estimates.clipped_per_example import clipped_per_example
from research.estimates.exact import exact
from research.estimates.sharpness_aware import sharpness_aware

__all__ = ["accumulated", "clipped_per_example", "exact", "sharpness_aware"]
