"""``python -m bench anchors``: how fast this machine copies and multiplies, now.

Other commands measure these anchors themselves; on its own the command adds one moment to
``anchors.json``, so that what ran between two moments can be judged by how much they differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import timing
from bench.console import make_console
from bench.environment import describe, one_line
from bench.records import write_json
from bench.strict_json import read_json
from bench.verify import DTYPES, pick_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench anchors``."""
    parser.add_argument("--moment", default="start", help="what to call it (default: start)")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder for results")


def run(args: argparse.Namespace) -> int:
    """Measures, prints and adds to ``anchors.json``."""
    device = pick_device(args.device)
    console = make_console()
    environment = describe()
    console.print(one_line(environment), markup=False, soft_wrap=True)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    found = timing.measure_anchors(args.moment, device, [DTYPES[dtype]])
    console.print(
        f"{args.moment}: copy {found.copy_bytes_per_s / 1e9:,.1f} GB/s, {dtype} matmul "
        f"{found.matmul_flops_per_s[dtype] / 1e9:,.0f} GFLOP/s",
        markup=False,
    )
    path = args.out / "anchors.json"
    moments = read_json(path)["measured"] if path.exists() else []
    write_json(path, {"environment": environment, "measured": [*moments, found]})
    console.print(f"written: {path}", markup=False)
    return 0
