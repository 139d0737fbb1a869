"""Linear attention in chunks of 64 tokens, segment by segment, in plain PyTorch; any device.

Inside a segment everything is batched over its chunks and heads; only the state walks from chunk
to chunk. The backward keeps no states: it finds those between segments again, and then walks back.
With ``S`` the state at the start of a chunk and ``dS`` the cotangent of the state at its end:

    o_i  = S^T (exp(G_i) q_i) + sum_{j <= i} A_ij v_j
    S    = exp(G_C) S + sum_j (exp(G_C - G_j) k_j) v_j^T                    (of the next chunk)
    dq_i = exp(G_i) (S do_i) + sum_{j <= i} dA_ij exp(G_i - G_j) k_j        dA_ij = do_i . v_j
    dk_j = exp(G_C - G_j) (dS v_j) + sum_{i >= j} dA_ij exp(G_i - G_j) q_i
    dv_j = dS^T (exp(G_C - G_j) k_j) + sum_{i >= j} A_ij do_i
    dS   = exp(G_C) dS + sum_i (exp(G_i) q_i) do_i^T                        (of the previous chunk)
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnvariants._checks import state_dtype
from attnvariants.eager._chunks import Segment, segments
from attnvariants.eager._decay import NoDecay, decay_of
from attnvariants.eager._epilogue import Epilogue
from attnvariants.eager._largest_score import largest_score
from attnvariants.eager._rows import Gradients, Inputs, Outputs


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    feature_map: str | None,
    causal: bool,
    scale: float,
    norm: str | None,
    eps: float,
    gate_activation: str | None,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of the operator ``linear_forward``."""
    inputs = Inputs(q, k, v, g, cu_seqlens, feature_map, state_dtype(q.dtype))
    epilogue = Epilogue.of(norm, eps, norm_weight, gate_activation, inputs.wide)
    outputs = Outputs(inputs, v, gate, epilogue, scale)
    walk = segments(inputs.bounds, inputs.heads, inputs.device)
    state = inputs.states(initial_state)
    if not causal:
        _add_writes(state, inputs, walk)
    carry = torch.zeros_like(state[0])
    for segment in walk:
        queries, values = segment.tiles(inputs.queries(segment.rows)), _values(inputs, segment)
        if causal:
            keys, decay = _keys(inputs, segment), decay_of(inputs, segment)
            writes = decay.to_end(keys).mT @ values
            states = _states(segment, decay, writes, carry, state, final=state)
            o = decay.scores(decay.operands(queries, keys)) @ values
            o += decay.from_start(queries) @ states[:-1]
            carry = states[-1]
        else:
            o = queries @ state[segment.sequences]
        outputs.write(segment.rows, segment.untile(o))
    max_logit = v.new_empty(0, dtype=inputs.wide)
    if stats:
        max_logit = largest_scores(q, k, v, g, cu_seqlens, feature_map, causal, scale)
    return outputs.out, outputs.y, outputs.rstd, state, max_logit


def largest_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """The largest ``|score|`` of every head ``[H]``, for every implementation of the engine."""
    precise = Inputs(q, k, v, g, cu_seqlens, feature_map, _one_number_precision(q.dtype))
    return (abs(scale) * largest_score(precise, causal)).to(state_dtype(q.dtype))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    y: Tensor | None,
    rstd: Tensor,
    dout: Tensor | None,
    dstate: Tensor | None,
    feature_map: str | None,
    causal: bool,
    scale: float,
    norm: str | None,
    eps: float,
    gate_activation: str | None,
    need_dg: bool,
) -> tuple[Tensor, ...]:
    """The results of the operator ``linear_backward``."""
    constant = need_dg and g is not None and g.dim() == 1
    wide = _one_number_precision(q.dtype) if constant else state_dtype(q.dtype)
    inputs = Inputs(q, k, v, g, cu_seqlens, feature_map, wide)
    epilogue = Epilogue.of(norm, eps, norm_weight, gate_activation, inputs.wide)
    tensors = (q, k, v, g if need_dg else None, norm_weight, gate)
    dout = v.new_zeros(()).expand(v.shape) if dout is None else dout
    gradients = Gradients(inputs, tensors, dout, y, rstd, epilogue, scale)
    dstate = inputs.states(dstate)
    if causal:
        _causal_backward(inputs, gradients, initial_state, dstate, need_dg)
    else:
        _bidirectional_backward(inputs, gradients, inputs.states(initial_state), dstate)
    dinitial = q.new_empty(0) if initial_state is None else dstate.to(initial_state.dtype)
    dg, dweight = gradients.sums()
    return gradients.dq, gradients.dk, gradients.dv, dg, dinitial, dweight, gradients.dgate


def _one_number_precision(dtype: torch.dtype) -> torch.dtype:
    """Of a result with one number per head: in float32 its rounding errors average nowhere."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64


def _causal_backward(
    inputs: Inputs,
    gradients: Gradients,
    initial_state: Tensor | None,
    dstate: Tensor,
    need_dg: bool,
) -> None:
    """Walks back; ``dstate`` turns from the final states' cotangents into the initial ones'."""
    walk = segments(inputs.bounds, inputs.heads, inputs.device)
    state = inputs.states(initial_state)
    starts = _starts(inputs, walk, state)
    dcarry = torch.zeros_like(state[0])
    for segment, start in zip(reversed(walk), reversed(starts), strict=True):
        queries, do = _queries_and_cotangent(inputs, gradients, segment)
        keys, values = _keys(inputs, segment), _values(inputs, segment)
        decay = decay_of(inputs, segment)
        incoming, outgoing = decay.from_start(queries), decay.to_end(keys)
        states = _states(segment, decay, outgoing.mT @ values, start, state)
        do_backwards = decay.faintest_first(do)
        dwrites = decay.faintest_first(incoming).mT @ do_backwards
        dstates = _dstates(segment, decay, dwrites, dcarry, dstate)
        dcarry = dstates[0]
        states, dstates = states[:-1], dstates[1:]

        operands = decay.operands(queries, keys)
        scores = decay.scores(operands)
        dv = decay.faintest_first(scores).mT @ do_backwards
        dv += outgoing @ dstates
        dq = decay.from_start(do @ states.mT)
        dk = decay.to_end(values @ dstates.mT)
        dg = None
        if need_dg:
            through = (states * dstates).sum(-1).unsqueeze(-2)  # [n, H, 1, K]
            dg = decay.gradient(through, queries * dq, keys * dk)
        decay.backward(operands, scores, do @ values.mT, dq, dk, dg)
        gradients.write(segment.rows, *(segment.untile(x) for x in (dq, dk, dv)))
        if dg is not None:
            gradients.write_decay(segment.rows, segment.untile(dg.result()))


def _bidirectional_backward(
    inputs: Inputs, gradients: Gradients, state: Tensor, dstate: Tensor
) -> None:
    """Every token sees the sum over its sequence, in ``state``; its cotangent is a sum too."""
    walk = segments(inputs.bounds, inputs.heads, inputs.device)
    _add_writes(state, inputs, walk)
    for segment in walk:
        queries, do = _queries_and_cotangent(inputs, gradients, segment, record=False)
        segment.add_to(dstate, queries.mT @ do)
    for segment in walk:
        _, do = _queries_and_cotangent(inputs, gradients, segment)
        dstates = dstate[segment.sequences]
        dq = do @ state[segment.sequences].mT
        dk = _values(inputs, segment) @ dstates.mT
        dv = _keys(inputs, segment) @ dstates
        gradients.write(segment.rows, *(segment.untile(x) for x in (dq, dk, dv)))


def _keys(inputs: Inputs, segment: Segment) -> Tensor:
    return segment.tiles(inputs.keys(segment.rows))


def _values(inputs: Inputs, segment: Segment) -> Tensor:
    return segment.tiles(inputs.values(segment.rows))


def _queries_and_cotangent(
    inputs: Inputs, gradients: Gradients, segment: Segment, record: bool = True
) -> tuple[Tensor, Tensor]:
    """The queries times ``scale * r``, and the cotangent that goes with them."""
    queries = inputs.queries(segment.rows) * gradients.row_scale(segment.rows)
    return segment.tiles(queries), segment.tiles(gradients.cotangent(segment.rows, record))


def _add_writes(state: Tensor, inputs: Inputs, walk: list[Segment]) -> None:
    """Adds ``sum_j k_j v_j^T`` of every sequence to its state."""
    for segment in walk:
        segment.add_to(state, _keys(inputs, segment).mT @ _values(inputs, segment))


def _starts(inputs: Inputs, walk: list[Segment], state: Tensor) -> list[Tensor]:
    """The state that every segment starts from, ``[H, K, V]``."""
    starts = [torch.zeros_like(state[0])]
    for segment in walk[:-1]:
        decay = decay_of(inputs, segment, inside=False)
        writes = decay.to_end(_keys(inputs, segment)).mT @ _values(inputs, segment)
        starts.append(_states(segment, decay, writes, starts[-1], state)[-1].clone())
    return starts


def _states(
    segment: Segment,
    decay: NoDecay,
    writes: Tensor,
    carry: Tensor,
    initial: Tensor,
    final: Tensor | None = None,
) -> Tensor:
    """States at the start of every chunk and behind the last one, ``[n + 1, H, K, V]``."""
    states = writes.new_empty(len(writes) + 1, *writes.shape[1:])
    states[0] = carry
    for index, chunk in enumerate(segment.chunks):
        if chunk.opens:
            states[index] = initial[chunk.sequence]
        decay.across(index, states[index], writes[index], out=states[index + 1])
        if chunk.closes and final is not None:
            final[chunk.sequence] = states[index + 1]
    return states


def _dstates(
    segment: Segment, decay: NoDecay, writes: Tensor, carry: Tensor, dstate: Tensor
) -> Tensor:
    """Cotangents of the state at the start of the first chunk and at the end of every chunk."""
    dstates = writes.new_empty(len(writes) + 1, *writes.shape[1:])
    dstates[-1] = carry
    for index, chunk in reversed(list(enumerate(segment.chunks))):
        if chunk.closes:
            dstates[index + 1] = dstate[chunk.sequence]
        decay.across(index, dstates[index + 1], writes[index], out=dstates[index])
        if chunk.opens:
            dstate[chunk.sequence] = dstates[index]
    return dstates
