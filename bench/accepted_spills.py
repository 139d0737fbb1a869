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
_FEW_BYTES = (
    *(
        AcceptedSpill(
            f"linear_{kernel}_kernel",
            (100, 120),
            16,
            "float32 operands that tensor cores do not take; at most four registers too many",
            dtypes=("float32",),
        )
        for kernel in ("backward_v", "backward_qk", "cotangent")
    ),
    *(
        AcceptedSpill(
            f"linear_{kernel}_kernel",
            (90, 120),
            64,
            "smaller tiles of the values would compute all scores twice as often",
            case=f"{feature_map}, per token",
        )
        for kernel in ("forward", "backward_v")
        for feature_map in ("elu+1", "silu")
    ),
    *(
        AcceptedSpill(
            kernel,
            (arch,),
            24,
            "ptxas keeps to 168 registers by itself, for three programs per multiprocessor",
            case=case,
            dtypes=("bfloat16",),
        )
        for kernel, arch, case in (
            ("linear_backward_v_kernel", 86, "linear K=64 V=64 bare"),
            ("linear_backward_qk_kernel", 120, "linear K=128 V=256 bare, per token"),
        )
    ),
)
ACCEPTED = (*_ELEMENT_BY_ELEMENT, *_WIDE_HEADS, *_FEW_BYTES)
