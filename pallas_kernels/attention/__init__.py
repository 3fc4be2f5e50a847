"""Sparse attention: one mask algebra, four implementations."""

from pallas_kernels.attention import masks
from pallas_kernels.attention.api import sparse_attention
from pallas_kernels.attention.block_mask import BlockMask, SelectedBlocks, block_mask

__all__ = ["BlockMask", "SelectedBlocks", "block_mask", "masks", "sparse_attention"]
