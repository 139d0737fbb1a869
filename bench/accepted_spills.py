"""Register spills that ``python -m bench compile`` accepts, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from bench.compile_cases import UNALIGNED, CompileCase


@dataclass(frozen=True)
class AcceptedSpill:
    """A kernel that may spill up to ``stack`` bytes per thread on some chips, and why."""

    kernel: str
    archs: tuple[int, ...]
    stack: int
    reason: str
    case: str = ""  # part of the case's name
    dtypes: tuple[str, ...] = ()  # all of them if empty

    def covers(self, kernel: str, arch: int, case: CompileCase) -> bool:
        fits = not self.dtypes or case.dtype in self.dtypes
        return fits and kernel == self.kernel and arch in self.archs and self.case in case.label


_ELEMENT_BY_ELEMENT = tuple(
    AcceptedSpill(
        kernel,
        (80, 86, 89, 90, 100, 120),
        768,
        "rows that do not start at multiples of 16 elements are loaded element by element, which "
        "is slow with any tiles; they share the entries of the table with those that do",
        case=UNALIGNED,
    )
    for kernel in (
        "softmax_forward_kernel",
        "softmax_backward_dq_kernel",
        "softmax_backward_dkdv_kernel",
    )
)
_WIDE_HEADS = tuple(
    AcceptedSpill(
        kernel,
        (80, 86, 89, 90, 100, 120),
        320,
        "float32 operands that tensor cores do not take, of a head dim of 256: no tile of the "
        "values is smaller, and more warps leave each fewer registers",
        case="K=256 V=256",
        dtypes=("float32", "float16"),
    )
    for kernel in ("linear_forward_kernel", "linear_backward_v_kernel")
)
_MAP_AND_DECAY, _BARE, _FEATURES = "elu+1, per token", "bare, per token", "K=64 V=64 all features"
_FEW_BYTES = {
    "float32 operands that tensor cores do not take; at most four registers too many": (
        ("linear_backward_v_kernel", 100, 8, _FEATURES, "float32"),
        ("linear_backward_v_kernel", 120, 16, _FEATURES, "float32"),
        ("linear_backward_v_kernel", 100, 8, _BARE, "float32"),
        ("linear_backward_v_kernel", 120, 8, _BARE, "float32"),
        ("linear_backward_qk_kernel", 100, 8, _BARE, "float32"),
    ),
    "smaller tiles of the values would compute all scores twice as often": (
        ("linear_backward_v_kernel", 90, 8, _MAP_AND_DECAY, "bfloat16"),
    ),
    "tiles of half as many values spill as well": (
        ("linear_forward_kernel", 120, 40, _MAP_AND_DECAY, "bfloat16"),
        ("linear_forward_kernel", 120, 64, "silu, per token", "bfloat16"),
        ("linear_backward_v_kernel", 120, 32, _MAP_AND_DECAY, "bfloat16"),
    ),
    "ptxas keeps to 128 or 168 registers by itself, for three or four programs at a time": (
        ("linear_cotangent_kernel", 100, 8, _FEATURES, "float32"),
        ("linear_backward_v_kernel", 86, 16, "linear K=64 V=64 bare", "bfloat16"),
        ("linear_backward_qk_kernel", 120, 24, _BARE, "bfloat16"),
    ),
}
ACCEPTED = (
    *_ELEMENT_BY_ELEMENT,
    *_WIDE_HEADS,
    *(
        AcceptedSpill(kernel, (arch,), stack, reason, case, (dtype,))
        for reason, spills in _FEW_BYTES.items()
        for kernel, arch, stack, case, dtype in spills
    ),
)
