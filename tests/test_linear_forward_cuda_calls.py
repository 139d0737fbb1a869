"""CUDA C++ for whole sequences of linear attention as a caller meets it: beside Triton, compiled,
and where it refuses.

See ``test_linear_forward_cuda.py`` for what it computes.
"""

from __future__ import annotations

import pytest
import torch
from linear_checks import bounds, draw, gated, run, single, states
from torch import Tensor

from attnvariants._verify import compare

GATED = "gated_linear_attention"

pytestmark = pytest.mark.usefixtures("controls")


@pytest.mark.parametrize("kind", ["channel", "token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_agrees_with_triton(kind: str, dtype: torch.dtype) -> None:
    """Both within their budgets: so they are no further apart than the sum of them."""
    tensors = gated(130, kind, "mixed", (1, 2, 20, 16))
    tensors["gate"] = draw(1, 130, 2, 16)
    options = {"return_state": True, "norm": "head", "eps": 1e-3}
    for impl in ("cuda", "triton"):
        rows = compare(GATED, tensors, options, impl=impl, dtype=dtype, gradients=False)
        assert all(row.ok for row in rows), (impl, rows)


def test_a_gradient_is_refused() -> None:
    tensors = single(gated(20))
    tensors["k"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"it has no backward.*These can: 'triton'"):
        run(GATED, tensors, impl="cuda")
    with torch.no_grad():
        assert run(GATED, tensors, impl="cuda").isfinite().all()


def test_compiles_into_one_graph() -> None:
    tensors = single(gated(40)) | {"gate": torch.randn(1, 40, 2)}

    def step(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        return run(GATED, inputs, impl="cuda", return_state=True, norm="model")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**tensors), step(**tensors), rtol=0, atol=0)


def test_operator() -> None:
    tensors = single(gated(20))
    cu_seqlens = bounds(7, 0, 13)
    tensors["initial_state"] = states(tensors, 3).float()
    names = ("q", "k", "v", "g", "initial_state")
    arguments = [*(tensors[name] for name in names), cu_seqlens, None, torch.randn(1, 20, 2, 10)]
    options = (None, True, 0.3, "head", 1e-6, "silu", True, "cuda")
    torch.library.opcheck(torch.ops.attnvariants.linear_forward.default, (*arguments, *options))


def test_inputs_are_not_modified() -> None:
    tensors = single(gated(70))
    copies = {name: x.clone() for name, x in tensors.items()}
    run(GATED, tensors, impl="cuda", norm="model")
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)
