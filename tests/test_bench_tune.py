"""``python -m bench tune`` prunes what cannot work and ranks the rest against the table."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import pruning, timing, tune
from bench.ahead_of_time import Compiled
from bench.cases import Case
from bench.compile import Row
from bench.compile_cases import CompileCase, compile_cases
from bench.console import make_console
from bench.errors import BenchError
from bench.pruning import Candidate, Result
from bench.strict_json import write_json

TABLE = Candidate(64, 32, 4, 2)
CPU = torch.device("cpu")
SPACE = {"BT": (64, 128), "BS": (32,), "warps": (4,), "stages": (1, 2, 3)}


def _case(name: str = "K=64", **values: Any) -> CompileCase:
    def launchers(case: Case, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"forward": lambda: 2 * tensors["q"]}

    return CompileCase(Case("gated_sdpa", name, **values), "bfloat16", launchers, {"k": "forward"})


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[Candidate | None]:
    """Stands in for the compiler: 128 rows spill, three stages of 64 take too much memory."""
    asked: list[Candidate | None] = []

    @contextlib.contextmanager
    def using(kernel: str, candidate: Candidate | None) -> Iterator[None]:
        asked.append(candidate)
        yield

    def launches(case: CompileCase, arch: int) -> list[Compiled]:
        one = asked[-1] or TABLE
        tiles = {"BT": one.BT, "BS": one.BS}
        return [
            Compiled("other_kernel", arch, {}, 1, 1, 0.0),
            Compiled("k_kernel", arch, tiles, one.warps, one.stages, 0.0),
        ]

    def row_of(one: Compiled, case: CompileCase, accepted: Sequence[Any]) -> Row:
        assert one.kernel == "k_kernel"
        problems = ()
        if one.tiles["BT"] == 128:
            problems = ("spills 8 bytes per thread",)
        elif one.stages >= 2 and case.label == "K=128":
            problems = ("200,000 bytes of shared memory, there are 166,912",)
        known = {"warps": one.warps, "stages": one.stages, "registers": one.stages + one.arch}
        return Row("k_kernel", case.label, "", one.arch, one.tiles, **known, problems=problems)

    def in_workers(function: Callable[..., Any], tasks: Sequence[Any], jobs: int) -> Iterator[Any]:
        yield from ((index, function(task, print)) for index, task in enumerate(tasks))

    monkeypatch.setattr(pruning, "using", using)
    monkeypatch.setattr(pruning, "launches", launches)
    monkeypatch.setattr(pruning, "row_of", row_of)
    monkeypatch.setattr(pruning, "in_workers", in_workers)
    return asked


def _prune(*cases: CompileCase, **space: tuple[int, ...]) -> dict[Candidate, Result]:
    found = pruning.prune("k", cases, [90], SPACE | space, make_console())
    return {result.candidate: result for result in found}


# --- pruning -------------------------------------------------------------------------------------


def test_what_cannot_work_is_pruned(compiler: list[Candidate | None]) -> None:
    found = _prune(_case())
    assert len(found) == 6
    assert [one for one, result in found.items() if result.current] == [TABLE]
    assert [one for one, result in found.items() if not result.problem] == [
        TABLE,
        Candidate(64, 32, 4, 1),
        Candidate(64, 32, 4, 3),
    ]
    assert found[Candidate(128, 32, 4, 2)].problem == "spills 8 bytes per thread [K=64]"
    assert found[TABLE].registers == 92
    assert compiler.count(None) == 1


def test_the_table_may_be_all_there_is(compiler: list[Candidate | None]) -> None:
    assert list(_prune(_case(), BT=(64,), stages=(2,))) == [TABLE]


def test_a_candidate_has_to_work_in_every_case(compiler: list[Candidate | None]) -> None:
    found = _prune(_case(), _case("K=128"))
    assert [one for one, result in found.items() if not result.problem] == [Candidate(64, 32, 4, 1)]
    assert found[TABLE].problem.endswith("[K=128]")


def test_more_stages_are_not_tried_when_fewer_take_too_much(
    compiler: list[Candidate | None],
) -> None:
    stages = tuple(Candidate(64, 32, 4, count) for count in (1, 2, 3))
    found = pruning.prune_task(pruning.Task("k", (_case("K=128"),), 90, stages), print)
    assert [result.problem[:20] for result in found] == [
        "",
        "200,000 bytes of sha",
        "as with fewer stages",
    ]
    assert Candidate(64, 32, 4, 3) not in compiler


def test_a_launcher_that_ignores_a_candidate_is_noticed(
    compiler: list[Candidate | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = Compiled("k_kernel", 90, {"BT": 64, "BS": 32}, 4, 2, 0.0)
    monkeypatch.setattr(pruning, "launches", lambda case, arch: [fixed])
    found = _prune(_case())
    assert [one for one, result in found.items() if not result.problem] == [TABLE]
    assert found[Candidate(64, 32, 4, 1)].problem == f"the launcher makes it {TABLE} [K=64]"


def test_unknown_kernels_are_named() -> None:
    with pytest.raises(BenchError, match=r"no such kernel.*: k; there are .*softmax_forward"):
        pruning.prune("k", compile_cases(), [90], SPACE, make_console())


def test_candidates_reach_the_launch() -> None:
    from attnvariants.kernels import _configs

    with pruning.using("softmax_forward", Candidate(16, 32, 4, 1)):
        config = _configs.configure("softmax_forward", 2, 64)
        assert tuple(config) == (16, 32, 4, 1)
        assert config._fields == tuple(dataclasses.asdict(TABLE))
    assert _configs.configure("softmax_forward", 2, 64) != config


def test_candidates_reach_decode_steps() -> None:
    from attnvariants.kernels import softmax_decode

    sizes = (4, 64, 64, torch.bfloat16)
    with pruning.using("_attend_parts", Candidate(32, 128, 8, 2)):
        config = softmax_decode.configure(*sizes)
    assert (config.BT, config.BS, config.warps, config.stages) == (32, 128, 8, 2)
    assert softmax_decode.configure(*sizes) != config
    assert softmax_decode.configure(*sizes).BC == config.BC


# --- timing --------------------------------------------------------------------------------------


def test_timed_cases_are_larger_with_the_same_features() -> None:
    case = _case(
        length=64,
        key_length=128,
        heads=4,
        kv_heads=2,
        sequences=(20, 0, 44),
        options={"window": (8, None), "return_stats": True},
    )
    large = tune.enlarge(case, 4096, 16).case
    assert (large.length, large.key_length, large.heads, large.kv_heads) == (4096, 8192, 16, 8)
    assert large.sequences == (1280, 0, 2816)
    assert large.options == {"window": (8,) * 4 + (None,) * 4, "return_stats": True}
    assert tune.enlarge(_case(length=64), 10, 2).case.length == 64


def test_decode_steps_are_timed_behind_longer_caches() -> None:
    case = Case("attention_decode", "K=64", length=8, key_length=72, heads=8, kv_heads=2)
    small = next(one for one in compile_cases() if one.case.function == case.function)
    large = tune.enlarge(dataclasses.replace(small, case=case), 4096, 16).case
    assert (large.length, large.keys, large.heads, large.key_heads) == (8, 4104, 16, 4)


def test_a_decode_step_is_compared_again_from_the_same_cache() -> None:
    """In Triton's interpreter: every call appends to the cache, so it has to be put back."""
    case = Case("attention_decode", "K=16", length=1, key_length=17, key_dim=16)
    small = next(one for one in compile_cases() if one.case.function == case.function)
    step = dataclasses.replace(small, case=case, dtype="float32")
    table = Result(90, Candidate(16, 64, 8, 2), current=True)
    results = [table, Result(90, Candidate(16, 16, 4, 1)), Result(90, Candidate(16, 32, 4, 1))]
    tune.measure("_attend_parts", [step], results, make_console(), CPU)
    assert [result.problem for result in results] == ["", "", ""]
    assert all(result.ratio for result in results)


def test_a_wrong_candidate_is_out_and_the_others_are_ranked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running: list[Candidate | None] = [None]

    @contextlib.contextmanager
    def using(kernel: str, candidate: Candidate | None) -> Iterator[None]:
        running.append(candidate)
        yield
        running.pop()

    wrong, failing, fast = (Candidate(32, 32, 4, stages) for stages in (1, 2, 3))

    def call() -> torch.Tensor:
        if running[-1] == failing:
            raise RuntimeError("out of resource")
        return torch.full((8,), 1.5 if running[-1] == wrong else 1.0)

    class Stopwatch:
        def prepare(self, contender: timing.Contender) -> timing.Timing:
            contender.run(0)
            return timing.Timing()

        def sample(self, contender: timing.Contender) -> list[float]:
            return [1.0 if contender.name == str(fast) else 2.0]

    monkeypatch.setattr(tune, "using", using)
    monkeypatch.setattr(tune, "_calls", lambda *_: tune.Calls([call]))
    monkeypatch.setattr(timing, "stopwatch_for", lambda device: Stopwatch())
    results = [Result(90, TABLE, current=True)]
    results += [Result(90, one) for one in (wrong, failing, fast)]
    tune.measure("k", [_case(), _case("K=128")], results, make_console(), CPU)
    assert [result.ratio for result in results] == [1.0, None, None, 0.5]
    assert results[1].problem == "output 0 differs from the table's by 5.0e-01"
    assert results[2].problem == "RuntimeError: out of resource"
    tune.show(make_console(), "k", results)
    text = capsys.readouterr().out
    assert f"best: {fast}, 0.500 of the table's {TABLE}" in text
    assert "2 of 4 candidates are left, 1 give another result, 1 fail" in text
    lines = [line for line in text.splitlines() if line.strip().startswith("Config(")]
    assert [line.split(")")[0].strip() + ")" for line in lines] == [str(fast), str(TABLE)]


def test_a_shared_entry_has_to_be_left_on_every_chip() -> None:
    one, other = Candidate(64, 32, 4, 1), Candidate(32, 32, 4, 1)
    results = [
        Result(80, one),
        Result(80, other),
        Result(90, one, problem="spills"),
        Result(90, other),
    ]
    assert tune.everywhere(results) == [other]


def test_differences_see_infinities() -> None:
    x = torch.tensor([1.0, float("-inf")])
    assert tune.difference(x, x) == 0
    assert tune.difference(x.nan_to_num(neginf=0), x) == float("inf")
    assert tune.difference(torch.tensor([1.1, float("-inf")]), x) == pytest.approx(0.1)
    assert not tune.difference(torch.tensor([float("nan"), float("-inf")]), x) <= 1


# --- the command ---------------------------------------------------------------------------------


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return tune.run(parser.parse_args(["--kernel", "softmax_forward", *arguments]))


@pytest.mark.parametrize("left", [True, False])
def test_prune_only_writes_the_survivors(
    left: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def prune(kernel: str, cases: Any, archs: Any, space: Any, console: Console, jobs: int) -> Any:
        assert (kernel, archs, space["BT"], space["BS"]) == (
            "softmax_forward",
            [80],
            (64,),
            (16, 32, 64, 128),
        )
        assert cases
        assert all("K=64 " in f"{case.label} " for case in cases)
        return [Result(80, TABLE, current=True, problem="" if left else "spills 8 bytes")]

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(tune, "prune", prune)
    options = ("--case", "K=64 ", "--prune-only", "--archs", "80", "--BT", "64")
    assert _run(*options, "--out", str(tmp_path)) == int(not left)
    text = capsys.readouterr().out
    assert ("the table's entry Config(64, 32, 4, 2) is out: spills 8 bytes" in text) != left
    content = json.loads((tmp_path / "tune.json").read_text())
    assert content["results"][0]["candidate"] == dataclasses.asdict(TABLE)
    assert content["timed"] is False


def test_what_was_pruned_earlier_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left, spills = Candidate(64, 32, 4, 1), Candidate(128, 32, 4, 1)
    results = [Result(90, TABLE, current=True), Result(90, left), Result(90, spills, problem="x")]
    results.append(Result(80, left))
    file = tmp_path / "pruned.json"
    write_json(file, {"kernel": "softmax_forward", "results": results})

    def measure(kernel: str, cases: Any, survivors: Sequence[Result], *_: Any) -> None:
        assert [result.candidate for result in survivors] == [TABLE, left]
        for result in survivors:
            result.ratio = 1.0

    def anchors(moment: str, *_: Any) -> timing.Anchors:
        return timing.Anchors(moment, 1.0 if moment == "start" else 1.1, {})

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(timing, "measure_anchors", anchors)
    options = ("--case", "K=64 ", "--pruned", str(file), "--out", str(tmp_path))
    assert _run(*options, "--archs", "90") == 0
    assert "2 of 3 candidates are left" in capsys.readouterr().out
    content = json.loads((tmp_path / "tune.json").read_text())
    assert content["anchors"]["drift"] == pytest.approx(0.1)
    with pytest.raises(BenchError, match="has nothing about sm_120"):
        _run(*options, "--archs", "120")
    write_json(file, {"kernel": "other", "results": []})
    with pytest.raises(BenchError, match="is about other, not about softmax_forward"):
        _run(*options, "--archs", "90")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchError, match="TRITON_INTERPRET"):
        _run("--prune-only")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="no CUDA device to time on; --prune-only needs none"):
        _run()
    with pytest.raises(BenchError, match="no case of softmax_forward in float64"):
        _run("--prune-only", "--dtype", "float64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(BenchError, match="this device is sm_90"):
        _run("--archs", "80")
