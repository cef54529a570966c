"""LSTM, GRU and RNN of ONNX in float64, in both directions.

Equations as in the ONNX operators' specification. Lengths of their own, clipping and activations
other than the default ones raise `NotImplementedError`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, Any]
# (one step's input times its weights, the state) -> the next state, of which the first is put out
Step = Callable[[Array, list[Array]], list[Array]]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class _Recurrent(OpRun):
    """What the three share: directions, layout, and the walk over time."""

    op_domain = ""
    num_gates = 1
    num_states = 1

    def _step(self, direction: int, w: Array, r: Array, b: Array, p: Array | None) -> Step:
        """What one direction does at each moment; `w` is transposed already."""
        raise NotImplementedError

    def _run(
        self,
        x: Array,
        w: Array,
        r: Array,
        b: Array | None = None,
        sequence_lens: Array | None = None,
        initial_h: Array | None = None,
        initial_c: Array | None = None,
        p: Array | None = None,
        **attributes: Any,
    ) -> Any:
        self._check(attributes)
        is_batch_first = bool(attributes.get("layout"))
        x = np.swapaxes(x, 0, 1) if is_batch_first else x  # [time, batch, input]
        if sequence_lens is not None and not (sequence_lens == x.shape[0]).all():
            raise NotImplementedError("rows of different lengths")
        num_directions, hidden = r.shape[0], r.shape[2]
        b = np.zeros((num_directions, 2 * self.num_gates * hidden)) if b is None else b
        outputs, finals = [], []
        for index in range(num_directions):
            is_reversed = index == 1 or attributes.get("direction") == "reverse"
            states = []
            for initial in (initial_h, initial_c)[: self.num_states]:
                if initial is None:
                    states.append(np.zeros((x.shape[1], hidden)))
                else:
                    states.append(initial[:, index] if is_batch_first else initial[index])
            step = self._step(
                index, w[index].T, r[index], b[index], None if p is None else p[index]
            )
            times = range(x.shape[0])[::-1] if is_reversed else range(x.shape[0])
            hiddens = []
            for time in times:
                states = step(x[time], states)
                hiddens.append(states[0])
            outputs.append(np.stack(hiddens[::-1] if is_reversed else hiddens))
            finals.append(states)
        y = np.stack(outputs, 1)  # [time, direction, batch, hidden]
        last = [np.stack([states[i] for states in finals]) for i in range(self.num_states)]
        if is_batch_first:
            y, last = y.transpose(2, 0, 1, 3), [np.swapaxes(state, 0, 1) for state in last]
        return tuple([y, *last][: max(1, len(self.onnx_node.output))])

    def _check(self, attributes: dict[str, Any]) -> None:
        given = [name.lower() for name in attributes.get("activations") or []]
        usual = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
        wanted = usual[type(self).__name__]
        is_usual = all(name == wanted[at % len(wanted)] for at, name in enumerate(given))
        if not is_usual or attributes.get("clip") or attributes.get("input_forget"):
            raise NotImplementedError("activations of its own")


class LSTM(_Recurrent):
    num_gates, num_states = 4, 2

    def _step(self, direction: int, w: Array, r: Array, b: Array, p: Array | None) -> Step:
        bias = np.add(*np.split(b, 2))
        p_i, p_o, p_f = np.split(np.zeros(3 * r.shape[1]) if p is None else p, 3)

        def step(x: Array, states: list[Array]) -> list[Array]:
            h, c = states
            i, o, f, g = np.split(x @ w + h @ r.T + bias, 4, -1)
            cell = _sigmoid(f + p_f * c) * c + _sigmoid(i + p_i * c) * np.tanh(g)
            return [_sigmoid(o + p_o * cell) * np.tanh(cell), cell]

        return step


class GRU(_Recurrent):
    num_gates = 3

    def _step(self, direction: int, w: Array, r: Array, b: Array, p: Array | None) -> Step:
        w_bias, r_bias = np.split(b, 2)
        r_z, r_r, r_h = np.split(r, 3)
        b_z, b_r, b_h = np.split(r_bias, 3)
        is_linear_first = bool(getattr(self, "linear_before_reset", 0))

        def step(x: Array, states: list[Array]) -> list[Array]:
            (h,) = states
            z, reset, new = np.split(x @ w + w_bias, 3, -1)
            z = _sigmoid(z + h @ r_z.T + b_z)
            reset = _sigmoid(reset + h @ r_r.T + b_r)
            kept = reset * (h @ r_h.T + b_h) if is_linear_first else (reset * h) @ r_h.T + b_h
            return [(1 - z) * np.tanh(new + kept) + z * h]

        return step


class RNN(_Recurrent):
    def _step(self, direction: int, w: Array, r: Array, b: Array, p: Array | None) -> Step:
        bias = np.add(*np.split(b, 2))
        return lambda x, states: [np.tanh(x @ w + states[0] @ r.T + bias)]
