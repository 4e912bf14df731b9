"""Evidence rows: which sources they are of, and when they go stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import evidence


def tree(root: Path) -> Path:
    (root / "kernels" / "triton").mkdir(parents=True)
    (root / "csrc").mkdir()
    (root / "kernels" / "triton" / "a.py").write_text("x = 1\n")
    (root / "csrc" / "a.cpp").write_text("int x;\n")
    return root


def test_rows_go_stale_when_a_kernel_changes(tmp_path: Path) -> None:
    root = tree(tmp_path)
    row = {"kernels_sha256": evidence.kernels_sha256(root)}
    assert not evidence.is_stale(row, root)
    (root / "kernels" / "notes.md").write_text("not a kernel")
    (root / "csrc" / "lib.so").write_bytes(b"built")
    assert not evidence.is_stale(row, root)
    (root / "csrc" / "a.cpp").write_text("int y;\n")
    assert evidence.is_stale(row, root)
    assert not evidence.is_stale({"kernels_sha256": None}, root)
    with pytest.raises(ValueError, match="kernels/"):
        evidence.kernels_sha256(tmp_path / "nowhere")


CPU, CUDA = ({f"{device}{eight}" for eight in ("", " int8", " fp8")} for device in ("cpu", "cuda"))


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("kernels/linear.py", CPU | CUDA),
        ("csrc/common/rows.h", CPU | CUDA),
        ("csrc/cpu/gemm.inl", CPU),
        ("csrc/cpu/int8_simd.h", {"cpu int8"}),
        ("kernels/int8/cpu.py", {"cpu int8", "cuda int8"}),
        ("kernels/triton/int8.py", {"cuda int8"}),
        ("kernels/linear/triton.py", CUDA),
        ("csrc/cuda/ops.cpp", CUDA),
        ("kernels/fp8/quantize.py", {"cpu fp8", "cuda fp8"}),
        ("kernels/fp8/triton_rows.py", {"cuda fp8"}),
        ("kernels/prove/cases_fp8.py", {"cuda fp8"}),
        ("kernels/engine/eight_bits.py", {"cpu int8", "cuda int8", "cpu fp8", "cuda fp8"}),
    ],
)
def test_a_row_goes_stale_by_what_its_contender_can_run(
    changed: str, stale: set[str], tmp_path: Path
) -> None:
    root = tree(tmp_path)
    path = root / changed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("before")
    kinds = ({}, {"int8": True}, {"fp8": True})
    scopes = [evidence.scope_of(device, **kind) for device in ("cpu", "cuda") for kind in kinds]
    assert set(scopes) == CPU | CUDA
    rows = {
        scope: {"kernels_scope": scope, "kernels_sha256": evidence.kernels_sha256(root, scope)}
        for scope in [*scopes, None]
    }
    assert not any(evidence.is_stale(row, root) for row in rows.values())
    path.write_text("after")
    assert {scope for scope, row in rows.items() if evidence.is_stale(row, root)} == stale | {None}


def test_nothing_in_fp32_is_made_of_what_its_hash_leaves_out() -> None:
    """A C++ file that is no int8 one includes none; nor does a file of one device another's."""
    kept = {str(path) for path in evidence.sources(scope="cpu")}
    left = {path.name for path in evidence.sources() if str(path) not in kept}
    assert {"int8_simd.h", "int8.inl", "int8_cpu.py", "quantize.py", "fp8.py"} <= left
    for path in evidence.sources(scope="cpu"):
        included = set(re.findall(r'#include "(?:.*/)?([^"]+)"', path.read_text(encoding="utf-8")))
        assert not included & left, path


def test_no_hash_for_an_unknown_device() -> None:
    with pytest.raises(ValueError, match="expected cpu or cuda; got 'mps'"):
        evidence.scope_of("mps")


def test_a_renamed_kernel_is_another_kernel(tmp_path: Path) -> None:
    root = tree(tmp_path)
    before = evidence.kernels_sha256(root)
    (root / "csrc" / "a.cpp").rename(root / "csrc" / "b.cpp")
    assert evidence.kernels_sha256(root) != before


def test_command_line_keeps_no_folders() -> None:
    given = ["--arch", "deit_b", "--json", "/home/me/rows.json", "--images=/data/photos"]
    shown = "python bench/throughput.py --arch deit_b --json rows.json --images=photos"
    assert evidence.command_line(given) == shown
