"""How a gradient is computed: `Estimate`s, which wrap each other."""

from research.estimates.accumulated import accumulated
from research.estimates.clipped_per_example import clipped_per_example
from research.estimates.es import es
from research.estimates.exact import exact
from research.estimates.noise_reuse import noise_reuse
from research.estimates.noise_scale import noise_scale
from research.estimates.pes import pes
from research.estimates.sharpness_aware import sharpness_aware
from research.estimates.truncated import truncated

__all__ = [
    "accumulated",
    "clipped_per_example",
    "es",
    "exact",
    "noise_reuse",
    "noise_scale",
    "pes",
    "sharpness_aware",
    "truncated",
]
