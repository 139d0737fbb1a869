"""The sections of ``python -m bench gpu``: what runs in which order, in which share of the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ANCHORS, REPORT = 30.0, 45.0  # seconds that are kept for them


@dataclass(frozen=True)
class Section:
    """One command with results of its own.

    ``{root}`` stands for the folder of the run, ``{folder}`` for that of the section and ``{jobs}``
    for the processors. ``dry`` is what a dry run does instead, on a CPU.
    """

    name: str
    command: tuple[str, ...]
    dry: tuple[str, ...] = ()  # none: a dry run leaves it out
    weight: float = 0.0  # share of the time that is left to the sections from here on
    least: float = 0.0  # seconds that are kept for it whatever the others take
    always: bool = False  # runs in every call, finished or not
    resumes: bool = False  # goes on where it has ended early: called again while there is time
    timed: bool = False  # its results are times, which mean little where the machine drifts
    compiles: bool = False  # in a dry run too, where the others use Triton's interpreter


def sections() -> list[Section]:
    """All sections in order."""
    return [
        _anchors("start"),
        Section(
            "verify",
            (
                *("verify", "--impls", "cuda", "triton", "eager", "--jobs", "{jobs}"),
                *("--out", "{folder}"),
            ),
            (
                *("verify", "--quick", "--device", "cpu", "--dtypes", "float32", "--jobs", "2"),
                *("--functions", "linear_attention_decode", "--impls", "triton", "eager"),
                *("--out", "{folder}"),
            ),
            weight=12,
        ),
        Section(
            "replay",
            ("replay", "--large", "--out", "{folder}"),
            (
                *("replay", "--device", "cpu", "--dtypes", "float32", "--impls", "eager"),
                *("--functions", "diag_attention", "linear_attention_decode"),
                *("--large", "2000", "--out", "{folder}"),
            ),
            weight=5,
        ),
        Section(
            "sanitize",
            ("sanitize", "--resume", "--timeout", "120", "--out", "{folder}"),
            (
                *("sanitize", "--resume", "--without-tool", "--impls", "triton"),
                *("--functions", "linear_attention_decode", "--out", "{folder}"),
            ),
            weight=6,
        ),
        _speed("decode", 14, "decode"),
        _speed("softmax", 12, *_BOTH, functions=("gated_sdpa", "ls_attention", "diag_attention")),
        _speed("linear", 12, *_BOTH, functions=("gated_linear_attention", "norm_linear_attention")),
        _speed("sweep", 4, *_BOTH),
        _anchors("middle"),
        _tune("_attend_parts", "K=128 one token", ("16", "32"), dry=_DRY_PRUNING),
        _tune("softmax_forward", "K=128 no gate", ("64", "128"), dry=_DRY_TUNING),
        _tune("softmax_backward_dq", "K=128 no gate", ("32", "64", "128")),
        _tune("softmax_backward_dkdv", "K=128 no gate", ("32", "64", "128")),
        _tune("softmax_forward", "K=64 no gate", ("64", "128")),
        _study("ls", 15, "mhsa", "ls"),
        _study("sweep", 12, "mhsa", "gla"),
        _anchors("end"),
        _report("report", "{root}"),
    ]


def chosen(names: Sequence[str] | None, *, dry: bool) -> list[Section]:
    """The sections of a call: all, or those named and the ones that always run."""
    return [
        section
        for section in sections()
        if (not names or section.name in names or section.always) and (section.dry or not dry)
    ]


def _anchors(moment: str) -> Section:
    command = ("anchors", "--moment", moment, "--out", "{root}")
    dry = (*command, "--device", "cpu")
    return Section(f"anchors-{moment}", command, dry, least=ANCHORS, always=True)


_BOTH = ("forward", "forward+backward")


def _speed(name: str, weight: float, *modes: str, functions: Sequence[str] = ()) -> Section:
    sweep = ("--only-sweep",) if name == "sweep" else ("--no-sweep",)
    named = ("--functions", *functions) if functions else ()
    command = ("speed", "--resume", "--modes", *modes, *named, *sweep, "--out", "{folder}")
    impls = ("triton", "eager") if name == "decode" else ("eager",)
    dry = (*command, "--tiny", "--rounds", "2", "--device", "cpu", "--impls", *impls)
    return Section(f"speed-{name}", command, dry, weight=weight, resumes=True, timed=True)


_DRY = ("--kernel", "_attend_parts", "--dtype", "float32", "--case", "K=128 one token")
_DRY_PRUNING = (
    *("tune", *_DRY, "--prune-only", "--archs", "90", "--out", "{folder}"),
    *("--BT", "16", "--BS", "32", "--warps", "8", "--stages", "1"),
)
_DRY_TUNING = (
    *("tune", *_DRY, "--archs", "90", "--pruned", "{root}/tune-_attend_parts-K128/tune.json"),
    *("--length", "32", "--heads", "2", "--rounds", "2", "--out", "{folder}"),
)


def _tune(kernel: str, case: str, rows: tuple[str, ...], dry: tuple[str, ...] = ()) -> Section:
    """Fewer candidates than ``bench tune`` has by default: compiling them takes the time."""
    command = (
        *("tune", "--kernel", kernel, "--case", case, "--jobs", "{jobs}", "--out", "{folder}"),
        *("--BT", *rows, "--BS", "32", "64", "128", "--stages", "2", "3"),
    )
    size = case.split()[0].replace("=", "")
    return Section(
        f"tune-{kernel}-{size}", command, dry, weight=3, timed=True, compiles="--prune-only" in dry
    )


def _study(name: str, weight: float, *dry_mixers: str) -> Section:
    preset = {"ls": "gpu-ls", "sweep": "gpu"}[name]
    command = ("logits", "--preset", preset, "--resume", "--out", "{folder}")
    dry = (
        *(*command, "--device", "cpu", "--no-compile", "--dtype", "float32", "--workers", "1"),
        *("--mixers", *dry_mixers, "--no-control", "--lrs", "6e-4", "--corpus", "topics"),
        *("--corpus-bytes", "100000", "--steps", "2", "--batch", "1", "--length", "32"),
        *("--layers", "1", "--warmup", "1", "--stats-every", "1", "--probe-every", "2"),
        *("--eval-every", "2", "--probe-sequences", "1", "--eval-sequences", "1"),
        *("--overhead-pairs", "0"),
    )
    full = (*command, "--workers", "3")
    return Section(f"logits-{name}", full, dry, weight=weight, timed=True)


def _report(name: str, folder: str) -> Section:
    return Section(name, ("report", folder), ("report", folder), least=REPORT, always=True)
