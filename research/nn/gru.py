"""A gated recurrent unit along a sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from research.nn.functional import param
from research.nn.linear import BIASES, KERNELS, per_channel
from research.nn.products import matmul


class GRU(nnx.Module):
    """[batch, length, inputs] -> hidden states [batch, length, hidden] (Cho et al. 2014, arXiv 1406.1078, eqs. 5 to 8).

    r, z = sigmoid(W x + b + U h + c), n = tanh(W_n x + b_n + r (U_n h + c_n)), h' = (1 - z) n + z h: the reset gate acts after
    the product with U_n, and there are two biases, as in cuDNN and PyTorch. reverse: from the end to the beginning. unroll:
    steps a loop iteration (small layers are bound by the loop otherwise).
    """

    def __init__(self, inputs: int, hidden: int, *, reverse: bool, init: str, dtype: str, unroll: int, rngs: nnx.Rngs):
        def kernel(rows: int) -> jax.Array:
            return KERNELS[init](rngs.params(), (rows, 3 * hidden), hidden)

        self.input_kernel = param(kernel(inputs), "embed", "mlp")
        self.hidden_kernel = param(kernel(hidden), None, "mlp")
        self.input_bias = param(BIASES[init](rngs.params(), (3 * hidden,), hidden), "mlp")
        self.hidden_bias = param(BIASES[init](rngs.params(), (3 * hidden,), hidden), "mlp")
        self.hidden, self.reverse, self.dtype, self.unroll = hidden, reverse, dtype, unroll

    def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
        b, t, _ = x_BxTxC.shape
        driven = matmul(x_BxTxC, self.input_kernel[...], self.dtype)
        driven = driven + per_channel(self.input_bias[...], driven)
        driven_TxBx3H = driven.reshape(b, t, -1).swapaxes(0, 1)
        kernel, bias = self.hidden_kernel[...], self.hidden_bias[...][None]

        def step(h, driven):
            recurrent = matmul(h, kernel, self.dtype) + bias
            (reset, update, new), (reset_h, update_h, new_h) = (jnp.split(a, 3, axis=-1) for a in (driven, recurrent))
            update = jax.nn.sigmoid(update + update_h)
            new = jnp.tanh(new + jax.nn.sigmoid(reset + reset_h) * new_h)
            h = (1 - update) * new + update * h
            return h, h

        start = jnp.zeros((b, self.hidden))
        _, states_TxBxH = jax.lax.scan(step, start, driven_TxBx3H, reverse=self.reverse, unroll=min(self.unroll, t))
        return states_TxBxH.swapaxes(0, 1)
