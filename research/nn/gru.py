"""A gated recurrent unit along a sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from research.nn.functional import Layer, param
from research.nn.linear import BIASES, KERNELS
from research.nn.products import contract


class GRU(Layer):
    """[batch, length, inputs] -> hidden states [batch, length, hidden] (Cho et al. 2014, arXiv 1406.1078, eqs. 5 to 8).

    r, z = sigmoid(W x + b + U h + c), n = tanh(W_n x + b_n + r (U_n h + c_n)), h' = (1 - z) n + z h: the reset gate acts after
    the product with U_n, and there are two biases, as in cuDNN and PyTorch. reverse: from the end to the beginning. unroll:
    steps of time in one iteration of the loop.
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
        b, t, c = x_BxTxC.shape
        # examples along the last axis: a layer is often narrower than a vector register, a batch is not
        driven = contract("io,ni->on", self.input_kernel[...], x_BxTxC.swapaxes(0, 1).reshape(t * b, c), self.dtype)
        driven = driven + self.input_bias[...][:, None]
        driven_Tx3HxB = driven.reshape(-1, t, b).swapaxes(0, 1)
        kernel, bias = self.hidden_kernel[...], self.hidden_bias[...][:, None]

        def step(h_HxB, driven_3HxB):
            recurrent = contract("io,ib->ob", kernel, h_HxB, self.dtype) + bias
            (reset, update, new), (reset_h, update_h, new_h) = (jnp.split(a, 3) for a in (driven_3HxB, recurrent))
            update = jax.nn.sigmoid(update + update_h)
            new = jnp.tanh(new + jax.nn.sigmoid(reset + reset_h) * new_h)
            h_HxB = (1 - update) * new + update * h_HxB
            return h_HxB, h_HxB

        start = jnp.zeros((self.hidden, b))
        _, states_TxHxB = jax.lax.scan(step, start, driven_Tx3HxB, reverse=self.reverse, unroll=min(self.unroll, t))
        return states_TxHxB.transpose(2, 0, 1)
