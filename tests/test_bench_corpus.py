"""Real text, read in place."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch

from bench import corpus
from bench.errors import BenchError


def test_stdlib_is_sources_without_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["b.py", "a/c.py", "a.py", "a/test/x.py", "site-packages/y.py", "a/tests/z.py", "d.txt"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name:-<2000}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = corpus.load("stdlib")
    text = bytes(torch.cat([found.train, found.val]).tolist()).decode()
    assert text == "".join(f"{name:-<2000}" for name in ("a/c.py", "a.py", "b.py"))
    assert found.info.files == 3
    assert found.info.path == str(tmp_path)


def test_real_stdlib_has_the_size_asked_for() -> None:
    found = corpus.load("stdlib", 300_000)
    assert found.info.bytes == 300_000
    assert found.info.train_bytes == len(found.train) == 270_000
    assert found.info.val_bytes == len(found.val) == 30_000
    assert found.info.source == found.info.name == "stdlib"
    data = bytes(torch.cat([found.train, found.val]).tolist())
    assert hashlib.sha256(data).hexdigest() == found.info.sha256
    assert found.info.sha256 == corpus.load("stdlib", 300_000).info.sha256


@pytest.mark.parametrize("name", ["topics", "torch"])
def test_named_corpora(name: str) -> None:
    found = corpus.load(name, 100_000)
    assert found.info.bytes == 100_000
    assert found.info.name == name


def test_file_folder_and_pattern(tmp_path: Path) -> None:
    root = tmp_path / ".hidden" / "stdlib"  # only what is hidden below the folder is left out
    (root / "sub").mkdir(parents=True)
    (root / "b.md").write_bytes(b"b" * 3000)
    (root / "sub" / "a.txt").write_bytes(b"a" * 3000)
    (root / ".secret").write_bytes(b"s" * 3000)
    (root / "image.png").write_bytes(b"\0" * 3000)

    one = corpus.load(str(root / "b.md"))
    assert one.info.bytes == 3000
    assert one.info.name == "b.md"

    folder = corpus.load(str(root), 4000)
    assert bytes(torch.cat([folder.train, folder.val]).tolist()) == b"b" * 3000 + b"a" * 1000
    assert folder.info.files == 2

    pattern = corpus.load(str(root / "**" / "*.txt"))
    assert pattern.info.bytes == 3000
    for found in (one, folder, pattern):
        again = corpus.load(found.info.source, found.info.bytes)
        assert again.info.sha256 == found.info.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"x" * 100, "only 100 bytes"), (b"x\0" * 2000, "not text")],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(BenchError, match=message):
        corpus.load(str(path))


def test_absent_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchError, match=r"no corpus .*stdlib, topics, torch"):
        corpus.load(str(tmp_path / "nothing"))
    with pytest.raises(BenchError, match="is empty"):
        corpus.load(str(tmp_path))
    with pytest.raises(BenchError, match="is empty"):
        corpus.load(str(tmp_path / "*.txt"))
    path = tmp_path / "text"
    path.write_text("x" * 5000)

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BenchError, match=r"cannot read the corpus file .*Permission denied"):
        corpus.load(str(path))


def test_length_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("x" * 3000)
    found = corpus.load(str(path))
    found.check_length(149)
    with pytest.raises(BenchError, match="at least 3030 bytes or a smaller --length"):
        found.check_length(150)
    (tmp_path / "more").write_text("x" * 3030)
    corpus.load(str(tmp_path / "more")).check_length(150)
