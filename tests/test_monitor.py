"""LogitMonitor: maxima against explicit scores, and what reading, copying and ranks do to them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnvariants import (
    DiagAttention,
    GatedAttention,
    GatedLinearAttention,
    LogitMonitor,
    LSAttention,
    NormLinearAttention,
)

ROOT = Path(__file__).resolve().parents[1]
DECAY = [0.0, -0.1, -1.0, -5.0]


class Hybrid(nn.Module):
    """One layer of each kind, with residuals."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        shared: dict[str, Any] = {"embed_dim": 32, "num_heads": 4, "dtype": dtype}
        grouped = {**shared, "num_kv_heads": 2, "rope_base": None}
        self.layers = nn.ModuleDict(
            {
                "gated": GatedAttention(**grouped),
                "ls": LSAttention(**grouped, num_local_heads=1, local_window=3),
                "diag": DiagAttention(**shared, block_size=4),
                "gla": GatedLinearAttention(**shared, gate_logit_normalizer=1.0),
                "norm": NormLinearAttention(**shared, feature_map="silu", decay=DECAY),
            }
        )
        self.inputs: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.layers.items():
            self.inputs[name] = x.detach()
            x = x + layer(x)
        return x


def visible_scores(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    """Scores of the visible pairs, -inf elsewhere, ``[B, H, i, j]``, from the weights alone."""
    batch, length, _ = x.shape
    key_dim = layer.q_proj.out_features // 4
    q, k = (linear(x).view(batch, length, -1, key_dim) for linear in (layer.q_proj, layer.k_proj))
    k = k.repeat_interleave(4 // k.shape[2], 2)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0).expand(4, -1, -1)
    if name == "ls":
        near = torch.tensor([True, True, False, False])[:, None, None]
        visible = visible & (~near | (distance < 3))
    if name == "diag":
        block = torch.arange(length) // 4
        visible = visible & (block[:, None] == block)
    if name == "norm":
        q, k = nn.functional.silu(q), nn.functional.silu(k)
        found = torch.einsum("bihk,bjhk->bhij", q, k)
        found = found * (layer.decay[:, None, None] * distance).exp()
        return found.abs().masked_fill(~visible, -torch.inf)
    if name == "gla":
        gates = nn.functional.logsigmoid(layer.gk_proj(x)).view(q.shape).cumsum(1)
        decay = (gates[:, :, None] - gates[:, None]).exp()  # [B, i, j, H, K]
        found = torch.einsum("bihk,bjhk,bijhk->bhij", q, k, decay) / q.shape[-1] ** 0.5
        return found.abs().masked_fill(~visible, -torch.inf)
    return (torch.einsum("bihk,bjhk->bhij", q, k) / 8**0.5).masked_fill(~visible, -torch.inf)


def explicit(model: Hybrid) -> dict[str, Tensor]:
    return {
        f"layers.{name}": visible_scores(name, layer, model.inputs[name]).amax((0, 2, 3)).float()
        for name, layer in model.layers.items()
    }


def test_equals_the_explicit_maximum_in_a_hybrid_model() -> None:
    model, x = Hybrid(), 3 * torch.randn(2, 14, 32, dtype=torch.float64)
    with LogitMonitor(model) as monitor:
        model(x)
        found = monitor.read()
    assert list(found) == [f"layers.{name}" for name in ("gated", "ls", "diag", "gla", "norm")]
    assert all(maximum.dtype == torch.float32 for maximum in found.values())
    torch.testing.assert_close(found, explicit(model))


def test_kinds_and_groups() -> None:
    monitor = LogitMonitor(Hybrid())
    assert monitor.kinds == {
        "layers.gated": "softmax_logit",
        "layers.ls": "softmax_logit",
        "layers.diag": "softmax_logit",
        "layers.gla": "linear_score",
        "layers.norm": "linear_score",
    }
    assert monitor.head_groups["layers.ls"] == ["local", "local", "global", "global"]
    assert monitor.head_groups["layers.diag"] == ["local"] * 4
    assert monitor.head_groups["layers.gla"] == ["global"] * 4
    assert LogitMonitor(DiagAttention(8, 2, activation="relu")).kinds == {"": "linear_score"}


def test_negative_maxima_stay_negative() -> None:
    """q = -k: every logit of a token with itself is negative, and so is the largest."""
    layer = LSAttention(8, 2, num_local_heads=2, local_window=1, rope_base=None)
    layer.k_proj.weight.data = -layer.q_proj.weight.data
    with LogitMonitor(layer) as monitor:
        layer(torch.randn(1, 5, 8))
        assert (monitor.read()[""] < 0).all()


def test_reading_starts_anew() -> None:
    model = Hybrid()
    small, large = (scale * torch.randn(1, 6, 32, dtype=torch.float64) for scale in (0.1, 5.0))
    with LogitMonitor(model) as monitor:
        for part in monitor.read().values():
            assert torch.equal(part, torch.full((4,), -torch.inf))
        model(large)
        large_first = explicit(model)
        model(small)
        torch.testing.assert_close(monitor.read(), large_first)  # the maximum, not the last
        model(small)
        torch.testing.assert_close(monitor.read(), explicit(model))
        model(large)
    torch.testing.assert_close(monitor.read(), large_first)  # after the block: what is left
    for part in monitor.read().values():
        assert torch.equal(part, torch.full((4,), -torch.inf))


def test_micro_batches_fold_to_the_whole_batch() -> None:
    """Under gradient accumulation, in any order of forward and backward."""
    model, x = Hybrid(), torch.randn(6, 7, 32, dtype=torch.float64)
    with LogitMonitor(model) as monitor:
        model(x)
        whole = monitor.read()
        for part in x.split([1, 3, 2]):
            model(part).square().sum().backward()
        torch.testing.assert_close(monitor.read(), whole)


def test_results_do_not_change() -> None:
    """Bit by bit: outputs and gradients with, without and after a monitor."""
    model, x = Hybrid(torch.float32), torch.randn(2, 21, 32)

    def run() -> list[Tensor]:
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y, *(p.grad for p in model.parameters())]

    before = run()
    with LogitMonitor(model):
        during = run()
    for plain, watched, after in zip(before, during, run(), strict=True):
        assert torch.equal(plain, watched)
        assert torch.equal(plain, after)


def test_statistics_are_asked_for_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnvariants.modules import gated_sdpa as home

    asked = []
    function = home.gated_sdpa

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options.get("return_stats", False))
        return function(*args, **options)

    monkeypatch.setattr(home, "gated_sdpa", spy)
    layer, x = GatedAttention(8, 2), torch.randn(1, 3, 8)
    layer(x)
    with LogitMonitor(layer):
        layer(x)
    layer(x)
    with pytest.raises(ValueError, match="x has shape"), LogitMonitor(layer):
        layer(x[0])
    layer(x)
    assert asked == [False, True, False, False]


def test_packed_and_padded_calls_count_real_pairs_only() -> None:
    """Neither a pair across sequences nor a padding token reaches the maximum."""
    layer = GatedAttention(8, 2, rope_base=None, bias=True, dtype=torch.float64)
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    with LogitMonitor(layer) as monitor:
        layer(x[:, :3])
        layer(x[:, 3:])
        expected = monitor.read()
        layer(x, cu_seqlens=torch.tensor([0, 3, 7]).int())
        torch.testing.assert_close(monitor.read(), expected)
        rows = torch.full((2, 5, 8), 100.0, dtype=torch.float64)
        mask = torch.tensor([[True, True, True, False, False], [False, True, True, True, True]])
        rows[0, :3], rows[1, 1:] = x[0, :3], x[0, 3:]
        layer(rows, padding_mask=mask)
        torch.testing.assert_close(monitor.read(), expected)


@pytest.mark.parametrize("kind", ["gated", "ls", "diag"])
def test_steps_of_softmax_layers_count(kind: str) -> None:
    layer = Hybrid().layers[kind]
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad(), LogitMonitor(layer) as monitor:
        layer(x)
        whole = monitor.read()
        cache = layer.init_cache(2, 9)
        for piece in x.split([2, 1, 1, 5], dim=1):
            layer(piece, cache=cache)
        torch.testing.assert_close(monitor.read(), whole)


def test_steps_of_linear_layers_have_no_scores() -> None:
    layer, x = Hybrid().layers["gla"], torch.randn(2, 9, 32, dtype=torch.float64)
    cache = layer.init_cache(2, 9)
    with torch.no_grad(), LogitMonitor(layer) as monitor:
        layer(x[:, :8], cache=cache)
        assert monitor.read()[""].isfinite().all()
        layer(x[:, 8:], cache=cache)
        assert torch.equal(monitor.read()[""], torch.full((4,), -torch.inf))


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_models(compiled_first: bool) -> None:
    torch._dynamo.reset()
    layer, x = LSAttention(32, 4, num_local_heads=2, local_window=3), torch.randn(2, 9, 32)
    model = nn.Sequential(layer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if compiled_first:
        compiled(x)
    with LogitMonitor(model) as monitor:
        plain = model(x)
        expected = monitor.read()
        for _ in range(2):
            torch.testing.assert_close(compiled(x), plain)
            torch.testing.assert_close(monitor.read(), expected)
    compiled(x)
    torch.testing.assert_close(monitor.read(), {"0": torch.full((4,), -torch.inf)})
    with LogitMonitor(compiled) as again:
        compiled(x)
        torch.testing.assert_close(again.read(), {"_orig_mod.0": expected["0"]})


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    """The second forward pass meets the same numbers again, and the gradients stay."""
    model, x = Hybrid(), torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    gradient, x.grad = x.grad, None
    with LogitMonitor(model) as monitor:
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(monitor.read(), explicit(model))
    torch.testing.assert_close(x.grad, gradient)


def test_autocast_and_half_precision() -> None:
    layer, x = GatedAttention(32, 4, rope_base=None), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16), LogitMonitor(layer) as monitor:
        layer(x)
    half = copy.deepcopy(layer).bfloat16()
    with LogitMonitor(half) as other:
        half(x.bfloat16())
    for found in (monitor.read()[""], other.read()[""]):
        exact = visible_scores("gated", layer, x).amax((0, 2, 3))
        torch.testing.assert_close(found, exact, rtol=0.03, atol=0.03)


def test_maxima_are_fp32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer, x = GatedAttention(32, 4), torch.randn(2, 9, 32)
        with LogitMonitor(layer) as monitor:
            layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert monitor.read()[""].dtype == torch.float32


def test_inference_mode() -> None:
    layer, x = GatedAttention(8, 2), torch.randn(1, 3, 8)
    with torch.inference_mode(), LogitMonitor(layer) as monitor:
        layer(x)
        expected = monitor.read()
    with LogitMonitor(layer) as monitor, torch.inference_mode():
        layer(x)
    torch.testing.assert_close(monitor.read(), expected)
    with torch.inference_mode():
        monitor.__enter__()
    layer(x)  # outside of the mode that the monitor was entered in
    monitor.__exit__(None, None, None)
    torch.testing.assert_close(monitor.read(), expected)


def test_a_second_monitor_is_refused_and_changes_nothing() -> None:
    model, x = Hybrid(), torch.randn(1, 5, 32, dtype=torch.float64)
    with LogitMonitor(model) as monitor:
        with pytest.raises(RuntimeError, match="already watches the layer ''"):
            LogitMonitor(model.layers["norm"]).__enter__()
        with pytest.raises(RuntimeError, match=r"already watches the layer 'layers\.gated'"):
            monitor.__enter__()
        model(x)
        torch.testing.assert_close(monitor.read(), explicit(model))
    with monitor:  # entered again: from the start
        model(x)
        torch.testing.assert_close(monitor.read(), explicit(model))


def test_copies_are_not_watched() -> None:
    """A deep copy or a saved model made inside the block knows nothing of the monitor."""
    layer, x = GatedAttention(8, 2), torch.randn(1, 3, 8)
    with LogitMonitor(layer) as monitor:
        twin = copy.deepcopy(layer)
        twin(x)
        assert torch.equal(monitor.read()[""], torch.full((2,), -torch.inf))
        with LogitMonitor(twin) as other:
            twin(x)
        assert other.read()[""].isfinite().all()
        assert layer.state_dict().keys() == GatedAttention(8, 2).state_dict().keys()


def test_one_module_used_twice_and_casts_inside_the_block() -> None:
    layer, x = GatedAttention(8, 2), torch.randn(1, 3, 8)
    model = nn.Sequential(layer, layer)
    with LogitMonitor(model) as monitor:
        model(x)
        assert list(monitor.read()) == ["0"]
        model.double()(x.double())
        assert monitor.read()["0"].isfinite().all()


def test_nan_is_reported() -> None:
    layer = GatedAttention(8, 2)
    with LogitMonitor(layer) as monitor:
        layer(torch.full((1, 3, 8), torch.nan))
        layer(torch.randn(1, 3, 8))
        assert monitor.read()[""].isnan().all()


def test_ranks_share_one_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers and heads travel in one tensor."""
    sizes = []

    def all_reduce(tensor: Tensor, op: Any) -> None:
        assert op == dist.ReduceOp.MAX
        sizes.append(tensor.numel())
        tensor.clamp_(min=7.0)  # another rank saw 7 everywhere

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    model = Hybrid()
    with LogitMonitor(model) as monitor:
        model(torch.randn(1, 5, 32, dtype=torch.float64))
        for part in monitor.read().values():
            assert (part >= 7.0).all()
    assert sizes == [20]


def test_two_ranks(tmp_path: Path) -> None:
    code = """
import sys, torch, torch.distributed as dist
from attnvariants import GatedAttention, LogitMonitor
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
layer, x = GatedAttention(8, 2), torch.randn(2, 3, 8)
with LogitMonitor(layer) as monitor:
    layer(x[rank:rank + 1])
    found = monitor.read()[""]
dist.destroy_process_group()
with LogitMonitor(layer) as monitor:
    layer(x)
    assert torch.allclose(found, monitor.read()[""])
"""
    command = [sys.executable, "-c", code]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


def test_refused() -> None:
    with pytest.raises(ValueError, match="Linear contains no attention layer of attnvariants"):
        LogitMonitor(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        LogitMonitor({})
    with pytest.raises(RuntimeError, match="call read"):
        LogitMonitor(GatedAttention(8, 2)).read()
