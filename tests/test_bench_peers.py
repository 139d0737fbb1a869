"""Peers compute what they claim to, and say in one line why they cannot."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import attnvariants
from attnvariants._select import FUNCTIONS
from bench import package_peers, peers, torch_peers
from bench.cases import DECODING, FORWARD, TRAINING, Case
from bench.peers import Missing
from bench.speed_cases import speed_cases

GATED = Case("gated_sdpa", "gated", batch=2, length=100, heads=4, gate="elementwise")
HEADWISE = Case("gated_sdpa", "headwise", length=33, heads=4, kv_heads=2, gate="headwise")
LOCAL = Case("ls_attention", "ls", length=100, heads=3, options={"window": (20, 20, None)})
GROUPED = Case(
    "ls_attention", "ls", length=90, heads=6, kv_heads=3, options={"window": (7, None, None)}
)
GLA = Case("gated_linear_attention", "gla", length=70, value_dim=24, g="channel")
SIMPLE = Case("gated_linear_attention", "simple", length=70, g="token")
DIAG = Case("diag_attention", "diag", length=96, options={"block_size": 32})
DECODE = Case(
    "attention_decode",
    "decode",
    batch=2,
    length=1,
    key_length=40,
    heads=4,
    kv_heads=2,
    gate="elementwise",
)
RING = Case("attention_decode", "ring", length=1, key_length=40, options={"window": (9, None)})
STEP = Case("linear_attention_decode", "step", batch=2, length=1, g="channel", initial_state=True)
TOKEN_STEP = dataclasses.replace(STEP, g="token")
NORM_STEP = dataclasses.replace(
    STEP, g=None, options={"feature_map": "elu+1", "norm": "model", "scale": 1.0}
)
ABSENT = [
    ("fa3", GATED),
    ("fa4", GATED),
    ("fa3 two calls", LOCAL),
    ("fa4 two calls", LOCAL),
    ("fa3 decode", DECODE),
    ("fla chunk_gla", GLA),
    ("fla chunk_simple_gla", SIMPLE),
    ("fla chunk_linear_attn", Case("norm_linear_attention", "norm")),
    ("fla fused_recurrent_gla", STEP),
    ("fla fused_recurrent_simple_gla", TOKEN_STEP),
    ("fla fused_recurrent_linear_attn", NORM_STEP),
]


def _definition(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    options = dict(case.options)
    if case.function == "attention_decode":
        window = options.pop("window", None)
        return attnvariants.gated_sdpa(**tensors, window=window, impl="reference")
    function = case.function.replace("linear_attention_decode", "gated_linear_attention")
    if "feature_map" in options:
        function = "norm_linear_attention"
        options.pop("scale")
    return getattr(attnvariants, function)(**tensors, **options, impl="reference")


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("sdpa + gate", GATED),
        ("sdpa + gate", HEADWISE),
        ("sdpa math", GATED),
        ("sdpa flash", GATED),
        ("two calls", LOCAL),
        ("two calls", GROUPED),
        ("two calls of ours", LOCAL),
        ("two calls of ours", GROUPED),
        ("token loop", GLA),
        ("token loop, unbind", SIMPLE),
        ("sdpa in blocks", DIAG),
        ("sdpa decode", DECODE),
        ("sdpa decode", RING),
        ("plain step", STEP),
        ("plain step", TOKEN_STEP),
        ("plain step", NORM_STEP),
    ],
)
def test_peers_of_the_same_function_agree_with_the_definition(name: str, case: Case) -> None:
    entry = peers.peer(name)
    assert entry.same
    tensors = case.tensors()
    found = entry.build(case, tensors, FORWARD)()
    torch.testing.assert_close(found, _definition(case, tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("case", [DECODE, RING], ids=["gated", "ring"])
def test_flex_attention_decodes(case: Case) -> None:
    tensors = case.tensors()
    found = peers.peer("flex decode").build(case, tensors, DECODING)()
    torch.testing.assert_close(found, _definition(case, tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "mhsa flash"])
def test_plain_attention_is_another_function(name: str) -> None:
    entry = peers.peer(name)
    assert not entry.same
    found = entry.build(LOCAL, LOCAL.tensors(), FORWARD)()
    assert found.shape == (1, 100, 3, 16)


@pytest.mark.parametrize(("name", "case"), ABSENT)
def test_packages_that_are_absent_say_how_to_get_them(
    name: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_peers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(Missing, match=r"^not installed: ") as caught:
        peers.peer(name).build(case, case.tensors(), FORWARD)
    assert "\n" not in str(caught.value)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """What fla's fused_recurrent functions compute, called as they are."""
    assert options["output_final_state"]
    state = options["initial_state"]
    decay = torch.ones(()) if g is None else g.exp()[:, 0]
    while 0 < decay.dim() < state.dim():
        decay = decay[..., None]
    new = decay * state + k[:, 0, :, :, None] * v[:, 0, :, None]
    scale = options["scale"] or q.shape[-1] ** -0.5
    return scale * torch.einsum("bhk,bhkv->bhv", q[:, 0], new)[:, None], new


@pytest.mark.parametrize(
    ("name", "function", "case"),
    [
        ("fla fused_recurrent_gla", "fused_recurrent_gla", STEP),
        ("fla fused_recurrent_simple_gla", "fused_recurrent_simple_gla", TOKEN_STEP),
        ("fla fused_recurrent_linear_attn", "fused_recurrent_linear_attn", NORM_STEP),
    ],
)
def test_fla_is_asked_for_the_same_step(
    name: str, function: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the package, which needs a GPU."""

    def stand_in(module: str, install: str, wanted: str, inputs: object) -> Any:
        assert (module.split(".")[0], wanted) == ("fla", function)
        return _recurrence

    monkeypatch.setattr(package_peers, "_from", stand_in)
    tensors = case.tensors()
    call = peers.peer(name).build(case, tensors, DECODING)
    torch.testing.assert_close(call(), _definition(case, tensors), rtol=1e-4, atol=1e-5)
    assert torch.equal(call(), call())  # always from the same state


@pytest.mark.parametrize(
    ("name", "case"),
    [("sdpa cudnn, compiled", GATED), ("sdpa flash, compiled", GATED), ("mhsa cudnn", LOCAL)],
)
def test_back_ends_without_their_device_say_so(name: str, case: Case) -> None:
    with pytest.raises(Missing, match=r"takes cuda tensors, got cpu|needs g\+\+"):
        peers.peer(name).build(case, case.tensors(), FORWARD)


def test_a_package_that_cannot_be_imported_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_peers.importlib.util, "find_spec", lambda package: object())
    inputs = {"q": torch.empty(1, device="meta")}
    with pytest.raises(Missing, match="takes CUDA tensors"):
        package_peers._from("fla.ops.gla", "pip", "chunk_gla", inputs)


@pytest.mark.parametrize(
    ("name", "case", "mode", "why"),
    [
        ("sdpa efficient", GATED, FORWARD, "takes cuda tensors, got cpu"),
        ("sdpa cudnn", GATED, FORWARD, "takes cuda tensors, got cpu"),
        ("sdpa math", Case("gated_sdpa", "x", length=1 << 17), FORWARD, "scores alone take"),
        ("flex", GATED, TRAINING, "no backward on a CPU"),
        ("two calls", Case("ls_attention", "x", options={"window": (3, 4)}), FORWARD, "one window"),
        ("two calls", Case("ls_attention", "x", options={"window": 3}), FORWARD, "global head"),
        ("token loop", Case("gated_linear_attention", "x", length=5000, g="head"), FORWARD, "5000"),
        ("sdpa in blocks", Case("diag_attention", "x", length=65), FORWARD, "multiple of 64"),
        ("fa3 decode", RING, DECODING, "not installed"),
    ],
)
def test_what_a_peer_cannot_do(name: str, case: Case, mode: str, why: str) -> None:
    inputs = {"q": torch.empty(1)} if case.length > 10_000 else case.tensors()
    with pytest.raises(Missing, match=why):
        peers.peer(name).build(case, inputs, mode)


def test_compilers_are_needed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_peers.shutil, "which", lambda name: None)
    for name in ("flex", "sdpa + gate, compiled"):
        with pytest.raises(Missing, match=r"needs g\+\+"):
            peers.peer(name).build(GATED, GATED.tensors(), FORWARD)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_every_case_names_peers_that_exist(device: str, quick: bool) -> None:
    cases = speed_cases(device, quick=quick)
    assert {name for entry in cases for name in entry.peers} <= set(peers._PEERS)
    assert {entry.case.function for entry in cases} == set(FUNCTIONS)
    assert {entry.sweep for entry in cases} == {True, False}


def test_nothing_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, bench.peers; "
        "sys.exit(any(n in sys.modules for n in ('fla', 'flash_attn', 'flash_attn_interface')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
