"""Real text for the logit-growth study, read in place as bytes; none of it is copied or shipped.

==============  ================================================================================
``stdlib``      sources of the running Python's standard library, without its tests (PSF-2.0)
``topics``      ``pydoc_data.topics``, 0.5 MB of English about Python (PSF-2.0)
``torch``       sources of the installed PyTorch, without its tests (BSD-3-Clause)
``PATH``        a file, a folder (all text files in it), or a pattern such as ``'notes/**/*.md'``
==============  ================================================================================

Files are joined in sorted order up to a limit; the sha256 of the bytes used is recorded, because
the standard library differs between Python versions.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.errors import BenchError
from bench.records import CorpusInfo

DEFAULT_BYTES = 4_000_000
TRAIN_SHARE = 0.9
VOCABULARY = 256  # bytes

_SKIPPED = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages"}
_LEAST_BYTES = 2000


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, the first 90 % to train on and the rest to validate."""

    info: CorpusInfo
    train: Tensor  # uint8 [train_bytes]
    val: Tensor  # uint8 [val_bytes]

    def check_length(self, length: int) -> None:
        """Requires a validation part of at least two sequences of ``length``.

        Raises:
            BenchError: the corpus is too small.
        """
        if self.info.val_bytes < 2 * (length + 1):
            need = round(2 * (length + 1) / (1 - TRAIN_SHARE)) + 10
            raise BenchError(
                f"the corpus {self.info.path} has {self.info.bytes} bytes, too few for sequences "
                f"of {length}: give at least {need} bytes or a smaller --length"
            )


def load(source: str = "stdlib", limit: int = DEFAULT_BYTES) -> Corpus:
    """Reads at most ``limit`` bytes of ``source``.

    Raises:
        BenchError: there is no such text, it cannot be read, or there is too little of it.
    """
    path, data, files = _read(source, limit)
    if len(data) < _LEAST_BYTES:
        what = "is empty" if not data else f"has only {len(data)} bytes"
        raise BenchError(
            f"the corpus {path} {what}; at least {_LEAST_BYTES} bytes of text are needed"
        )
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    split = int(len(data) * TRAIN_SHARE)
    info = CorpusInfo(
        name=source if source in _NAMED else Path(path).name,
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        train_bytes=split,
        val_bytes=len(data) - split,
        files=files,
        source=source if source in _NAMED else path,
    )
    return Corpus(info, tokens[:split], tokens[split:])


def _read(source: str, limit: int) -> tuple[str, bytes, int]:
    """Where the text lies, its first ``limit`` bytes, and from how many files they come."""
    if source in _NAMED:
        return _NAMED[source](limit)
    path = Path(source).expanduser()
    if path.is_file():
        return str(path.resolve()), *_join([path], limit)
    if path.is_dir():
        return str(path.resolve()), *_join(_text_files(path, "**/*"), limit)
    if glob.has_magic(source):
        plain = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        root = Path(*plain)
        pattern = "/".join(path.parts[len(plain) :])
        return str(path.absolute()), *_join(_text_files(root, pattern), limit)
    raise BenchError(
        f"there is no corpus {source!r}: --corpus takes {', '.join(_NAMED)}, a file, a folder or "
        "a quoted pattern such as 'notes/**/*.md'"
    )


def _stdlib(limit: int) -> tuple[str, bytes, int]:
    return _sources(Path(sysconfig.get_paths()["stdlib"]), limit)


def _torch(limit: int) -> tuple[str, bytes, int]:
    return _sources(Path(torch.__file__).parent, limit)


def _topics(limit: int) -> tuple[str, bytes, int]:
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise BenchError(f"this Python comes without pydoc_data: {error}") from error
    texts = [topics.topics[name] for name in sorted(topics.topics)]
    return str(topics.__file__), "\n".join(texts).encode()[:limit], 1


_NAMED = {"stdlib": _stdlib, "topics": _topics, "torch": _torch}


def _sources(root: Path, limit: int) -> tuple[str, bytes, int]:
    """The Python files under ``root`` that are neither tests nor other people's packages."""
    found = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(root).parts)
    ]
    return str(root), *_join(sorted(found), limit)


def _text_files(root: Path, pattern: str) -> list[Path]:
    """The regular files under ``root`` that match, in sorted order, without hidden ones."""
    return sorted(
        path
        for path in root.glob(pattern)
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def _join(paths: list[Path], limit: int) -> tuple[bytes, int]:
    """The first ``limit`` bytes of the files one after the other; binary files are left out."""
    data = bytearray()
    files = 0
    for path in paths:
        if len(data) >= limit:
            break
        try:
            with path.open("rb") as file:
                text = file.read(limit - len(data))
        except OSError as error:
            raise BenchError(f"cannot read the corpus file {path}: {error.strerror}") from error
        if b"\0" in text[:4096]:
            if len(paths) == 1:
                raise BenchError(f"the corpus {path} is not text: it contains zero bytes")
            continue
        data += text
        files += 1
    return bytes(data), files
