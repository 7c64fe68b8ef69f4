"""Routed SwiGLU experts and their gradients in float64, expert by expert."""

import numpy as np


def _silu(gate):
    return gate / (1.0 + np.exp(-gate))


def swiglu_oracle(operands, ids, d_y, stored=lambda rows: rows):
    """Returns y and the gradients of (x, w_gate, w_up, w_down, weights).

    The gradients see `stored` of the rows that enter the experts, and of their gate and up
    products.
    """
    x, w_gate, w_up, w_down, weights = operands
    y, d_x = np.zeros_like(x), np.zeros_like(x)
    d_gate, d_up, d_down = (np.zeros_like(w) for w in (w_gate, w_up, w_down))
    d_weights = np.zeros_like(weights)
    for expert in range(w_gate.shape[0]):
        token, k = np.nonzero(ids == expert)
        rows, weight, d_rows = x[token], weights[token, k][:, None], d_y[token]
        gate, up = rows @ w_gate[expert], rows @ w_up[expert]
        np.add.at(y, token, weight * (_silu(gate) * up @ w_down[expert]))
        rows, gate, up = stored(rows), stored(gate), stored(up)
        sigmoid = 1.0 / (1.0 + np.exp(-gate))
        hidden = gate * sigmoid * up
        out = hidden @ w_down[expert]
        d_weights[token, k] = np.sum(d_rows * out, axis=1)
        d_down[expert] = hidden.T @ (weight * d_rows)
        d_hidden = (weight * d_rows) @ w_down[expert].T
        d_pre = d_hidden * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_post = d_hidden * gate * sigmoid
        d_gate[expert], d_up[expert] = rows.T @ d_pre, rows.T @ d_post
        np.add.at(d_x, token, d_pre @ w_gate[expert].T + d_post @ w_up[expert].T)
    return y, d_x, d_gate, d_up, d_down, d_weights
