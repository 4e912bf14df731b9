"""Evidence rows: which sources they are of, when they go stale, and of one device a file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import evidence
from evidence import source_cpp, sources

ROOT = Path(__file__).parents[3]
Tree = dict[str, str]  # path -> text

# Two operators, one of them in 8 bits, whose implementations are found by name.
KERNELS: Tree = {
    "kernels/__init__.py": "from deit.kernels.linear import linear\n"
    "from deit.kernels.int8 import int8_linear\nfrom deit.kernels.fp8 import fp8_linear\n",
    "kernels/engine/dispatch.py": "from deit.kernels.engine import tables\n\n"
    "def run(name):\n    if name == 'gpu':\n"
    "        import deit.kernels.device.tuning\n    return tables.find(name)\n",
    "kernels/engine/tables.py": "import torch\nfrom deit.kernels.int8 import schema\n\n"
    "def find(name):\n    return schema.OPS[name]\n",
    "kernels/linear/__init__.py": "from deit.kernels.engine import dispatch\n"
    "from deit.kernels.linear.reference import plain\n\n"
    'def linear(x):\n    """y = x"""\n    return dispatch.run("linear") or plain(x)\n',
    "kernels/linear/reference.py": "import torch\n\n"
    "SCALE = 2\n\ndef plain(x):\n    return SCALE * x\n",
    "kernels/linear/triton.py": "import triton\nfrom deit.kernels.linear import tiles\n\n"
    "@triton.jit\ndef _linear(x):\n    return x\n\ndef linear(x):\n    return tiles.ROWS\n",
    "kernels/linear/tiles.py": "ROWS = 16\n",
    "kernels/linear/calls.py": "from deit.kernels.linear import triton\n\n"
    "CALLS = [triton.linear]\n",
    "kernels/device/tuning.py": "import triton\n\nTUNED = 1\n",
    "kernels/int8/__init__.py": "def int8_linear(x):\n    return x\n",
    "kernels/int8/schema.py": "OPS = {}\n",
    "kernels/int8/cpu.py": "import torch\n\n"
    "def int8_linear(x):\n    return torch.ops.deit_cpu.int8_linear(x)\n",
    "kernels/fp8/__init__.py": "def fp8_linear(x):\n    from deit.kernels.int8 import schema\n"
    "    return schema.OPS\n",
    "kernels/prove/aot.py": "import triton\nfrom deit.kernels.linear import calls\n\n"
    "ALL = calls.CALLS\n",
    "csrc/common/rows.h": "#pragma once\nnamespace deit {\ninline int rows() { return 1; }\n}\n",
    "csrc/cpu/linear.cpp": '#include "linear.inl"\n\nint run() { return twice(2); }\n',
    "csrc/cpu/linear.inl": '#include "../common/rows.h"\n'
    "namespace deit {\n#if defined(__AVX2__)\nconstexpr int LANES = 8;  // a register\n#else\n"
    "constexpr int LANES = 4;\n#endif\n\n"
    "/* twice */ inline int twice(int x) { return 2 * x; }\n}\n",
    "csrc/cpu/unused.inl": "int unused;\n",
    "csrc/cpu/int8.cpp": '#include "linear.inl"\nconst char* name = "int8 // no comment";\n',
    "csrc/cuda/linear.cu": '#include "../common/rows.h"\n__global__ void linear() {}\n',
    "deit/fused_vit/joined.py": "from deit.kernels.thirds import thirds\n",
    "kernels/thirds.py": "def thirds(x):\n    return x\n",
}  # fmt: skip
CPU, CUDA = ({f"{device}{eight}" for eight in ("", " int8", " fp8")} for device in ("cpu", "cuda"))
EIGHT = {scope for scope in CPU | CUDA if " " in scope}


def hashes(tree: Tree) -> dict[str | None, str]:
    return {scope: sources.sha256(tree, scope) for scope in (*sorted(CPU | CUDA), None)}


def changed(tree: Tree, path: str, before: str, after: str) -> Tree:
    assert tree[path].count(before) == 1, (path, before)
    return tree | {path: tree[path].replace(before, after)}


def stale(after: Tree) -> set[str | None]:
    before, now = hashes(KERNELS), hashes(after)
    return {scope for scope in before if before[scope] != now[scope]}


def write(tree: Tree, root: Path) -> Path:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_rows_go_stale_when_a_kernel_changes(tmp_path: Path) -> None:
    root = write(KERNELS, tmp_path)
    row = {"kernels_sha256": evidence.kernels_sha256(root)}
    assert not evidence.is_stale(row, root)
    (root / "kernels" / "notes.md").write_text("not a kernel")
    (root / "csrc" / "lib.so").write_bytes(b"\xff built")
    assert not evidence.is_stale(row, root)
    (root / "csrc" / "cpu" / "unused.inl").write_text("int another;\n")
    assert evidence.is_stale(row, root)
    assert not evidence.is_stale({"kernels_sha256": None}, root)
    with pytest.raises(ValueError, match="kernels/"):
        evidence.kernels_sha256(tmp_path / "nowhere")


def _moved(tree: Tree, old: str, new: str, *imports: tuple[str, str]) -> Tree:
    tree = {new if path == old else path: text for path, text in tree.items()}
    for before, after in imports:
        assert any(before in text for text in tree.values()), before
        tree = {path: text.replace(before, after) for path, text in tree.items()}
    return tree


def _split(tree: Tree) -> Tree:
    """`plain` to a file of its own, which finds the constant where it was."""
    head, plain = tree["kernels/linear/reference.py"].split("\n\ndef ")
    assert "SCALE * x" in plain
    parted = {
        "kernels/linear/reference.py": head + "\n",
        "kernels/linear/plainly.py": "import torch\nfrom deit.kernels.linear import reference\n\n"
        "def " + plain.replace("SCALE", "reference.SCALE"),
    }
    tree = tree | parted
    return changed(tree, "kernels/linear/__init__.py", "linear.reference", "linear.plainly")


def _split_cpp(tree: Tree) -> Tree:
    text = tree["csrc/cpu/linear.inl"]
    start = text.index("/* twice */")
    return tree | {
        "csrc/cpu/twice.h": "namespace deit {\n" + text[start:],
        "csrc/cpu/linear.inl": '#include "twice.h"\n' + text[:start] + "}\n",
    }


INIT, REFERENCE = "kernels/linear/__init__.py", "kernels/linear/reference.py"
INL = "csrc/cpu/linear.inl"
TIDY: dict[str, Callable[[Tree], Tree]] = {
    "comment": lambda t: changed(t, REFERENCE, "SCALE = 2", "# Why.\nSCALE = 2  # twice"),
    "docstring": lambda t: changed(t, INIT, '"""y = x"""', '"""The same.\n\n    Longer.\n    """'),
    "module docstring": lambda t: changed(t, REFERENCE, "import torch", '"""New."""\nimport torch'),
    "layout": lambda t: changed(t, REFERENCE, "SCALE * x", "(\n        SCALE\n        * x\n    )"),
    "quotes": lambda t: changed(t, INIT, '"linear"', "'linear'"),
    "imports for types": lambda t: changed(
        t, REFERENCE, "SCALE = 2", "if TYPE_CHECKING:\n    from deit.kernels import x\nSCALE = 2"
    ),
    "module moved": lambda t: _moved(
        t, "kernels/engine/tables.py", "kernels/lists.py",
        ("from deit.kernels.engine import tables", "from deit.kernels import lists"),
        ("tables.find", "lists.find"),
    ),
    "relative import": lambda t: changed(t, INIT, "deit.kernels.linear.reference", ".reference"),
    "another name for an import": lambda t: changed(
        changed(t, INIT, "import plain", "import plain as simple"), INIT, "plain(x)", "simple(x)"
    ),
    "function moved": _split,
    "order": lambda t: changed(t, REFERENCE, "SCALE = 2\n\n", "") | {
        REFERENCE: t[REFERENCE].replace("SCALE = 2\n\n", "") + "\nSCALE = 2\n"
    },
    "C++ comment": lambda t: changed(t, INL, "// a register", "/* a\n register of \"8\" */"),
    "C++ layout": lambda t: changed(t, INL, "{ return 2 * x; }", "{\n  return 2*x;\n}\n"),
    "C++ file moved": lambda t: _moved(
        t, INL, "csrc/common/inner/l.inl", ('"linear.inl"', '"../common/inner/l.inl"'),
        ('#include "../common/rows.h"\nnamespace', '#include "../rows.h"\nnamespace'),
    ),
    "C++ declaration moved": _split_cpp,
}  # fmt: skip


@pytest.mark.parametrize("tidy", TIDY)
def test_a_tidy_up_leaves_rows_fresh(tidy: str) -> None:
    after = TIDY[tidy](KERNELS)
    assert after != KERNELS
    assert stale(after) == set()


@pytest.mark.parametrize(
    ("path", "before", "after", "scopes"),
    [
        (REFERENCE, "SCALE = 2", "SCALE = 3", CPU | CUDA),
        (INIT, '"linear"', '"other"', CPU | CUDA),
        ("kernels/thirds.py", "return x", "return -x", CPU | CUDA),
        ("csrc/common/rows.h", "return 1", "return 2", CPU | CUDA),
        (INL, "2 * x", "2 + x", CPU),
        (INL, "defined(__AVX2__)", "defined(__AVX512F__)", CPU),
        (INL, "namespace deit {", "namespace {", CPU),
        ("csrc/cpu/int8.cpp", "// no", "// a", {"cpu int8"}),
        ("csrc/cuda/linear.cu", "{}", "{ return; }", CUDA),
        ("kernels/linear/triton.py", "return x", "return -x", CUDA),
        ("kernels/linear/tiles.py", "16", "32", CUDA),
        ("kernels/device/tuning.py", "1", "2", CUDA),
        ("kernels/int8/__init__.py", "return x", "return -x", EIGHT),
        ("kernels/int8/cpu.py", "deit_cpu.int8_linear(x)", "deit_cpu.other(x)", {"cpu int8"}),
        ("kernels/fp8/__init__.py", "schema.OPS", "not schema.OPS", {"cpu fp8", "cuda fp8"}),
        # fp8's own import of int8's schema counts. The import by the table of all does not.
        ("kernels/int8/schema.py", "{}", "{1: 2}", EIGHT),
        # What no contender runs: the catalogue of calls, the ahead-of-time gate, files unincluded.
        ("kernels/linear/calls.py", "[", "[None, ", set()),
        ("kernels/prove/aot.py", "calls.CALLS", "2 * calls.CALLS", set()),
        ("csrc/cpu/unused.inl", "unused", "other", set()),
    ],
)  # fmt: skip
def test_a_row_goes_stale_by_what_its_contender_can_run(
    path: str, before: str, after: str, scopes: set[str | None]
) -> None:
    assert stale(changed(KERNELS, path, before, after)) == scopes | {None}


def test_another_definition_of_the_same_name_is_a_change() -> None:
    """It is one, though the imports themselves are left out."""
    twice = KERNELS | {
        "kernels/linear/one.py": "def plain(x):\n    return x\n",
        "kernels/linear/two.py": "def plain(x):\n    return x + x\n",
        "kernels/linear/both.py": "from deit.kernels.linear import one, two\n",
    }
    twice = changed(twice, INIT, "linear.reference import plain", "linear.one import plain")
    twice = changed(twice, INIT, "def linear", "import deit.kernels.linear.both\n\ndef linear")
    other = changed(twice, INIT, "linear.one", "linear.two")
    assert {*sources.counted(twice, "cpu")} == {*sources.counted(other, "cpu")}
    assert sources.sha256(twice, "cpu") != sources.sha256(other, "cpu")


def test_cpp_is_taken_apart_where_that_is_sound() -> None:
    within = (
        "namespace a {\nint f(\n#if X\nint a\n#else\nlong a\n#endif\n);\nstruct S { int x; };\n}\n"
    )
    assert len(source_cpp.chunks(within)) == 2  # a condition within a declaration is a part of it
    around = "#if X\nint f(\n#else\nint g(\n#endif\nint a);\nint x;\n"
    assert len(source_cpp.chunks(around)) == 1
    assert len(source_cpp.chunks("int f(int a);\n#else\nint x;\n")) == 1  # past its own file
    macros = "#define N 2\nint x = N;\n#undef N\n#define N 3\nint y = N;\n"
    swapped = "#define N 3\nint x = N;\n#undef N\n#define N 2\nint y = N;\n"
    assert {*source_cpp.chunks(macros)} != {*source_cpp.chunks(swapped)}
    assert source_cpp.chunks("a + +b;") != source_cpp.chunks("a ++b;")
    assert source_cpp.chunks('auto x = R"(// no)";') != source_cpp.chunks('auto x = R"(// yes)";')


SEEN = """
import sys, torch
from deit import create, kernels
from deit.fused_vit import fuse
x, w = torch.randn(2, 5, 192), torch.randn(192, 192)
with torch.inference_mode():
    model = create("deit_ti", img_size=32).eval()
    fuse(model)
    for call in (lambda: model(torch.randn(1, 3, 32, 32)), lambda: kernels.int8_linear(x, w),
                 lambda: kernels.fp8_linear(x, w)):
        call()
        print(*(getattr(sys.modules[name], "__file__", "") for name in list(sys.modules)
                if name.startswith("deit.kernels")))
"""


def test_what_calls_load_counts() -> None:
    """In our own tree, imports tell all that runs. Only tables load the other 8 bits."""
    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr
    tree = sources.read(ROOT)
    for kind, line in zip(("", "int8", "fp8"), done.stdout.splitlines(), strict=True):
        files = {Path(name).resolve() for name in line.split()}
        loaded = {path.relative_to(ROOT).as_posix() for path in files if path.suffix == ".py"}
        loaded = {path for path in loaded if not path.startswith(sources.TOOLS)}
        expected = {path for path in loaded if kind in (sources.kinds(path) or kind)}
        assert len(expected) > 10
        assert expected <= {*sources.counted(tree, f"cpu {kind}".strip())}


def test_nothing_in_fp32_is_made_of_what_its_hash_leaves_out() -> None:
    """The tree is our own."""
    tree = sources.read(ROOT)
    for device in sources.DEVICES:
        counted = sources.counted(tree, device)
        assert not any(sources.kinds(path) for path in counted)
        assert not any(path.startswith(sources.TOOLS) for path in counted)
        other = {"cpu": "csrc/cuda/", "cuda": "csrc/cpu/"}[device]
        assert not any(path.startswith(other) for path in counted)
        for name in ("aot", "hazards", "offsets", "launches", "calls"):
            assert not any(path.endswith(f"/{name}.py") for path in counted), name
    triton = {path for path in tree if "@triton.jit" in tree[path] and not sources.kinds(path)}
    assert triton <= {*sources.counted(tree, "cuda")}
    assert not triton & {*sources.counted(tree, "cpu")}


def test_no_hash_for_an_unknown_device() -> None:
    with pytest.raises(ValueError, match="expected cpu or cuda; got 'mps'"):
        evidence.scope_of("mps")


def test_what_is_committed_is_of_one_device_a_file() -> None:
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        content = evidence.load(path)
        rows = evidence.read([path]) if isinstance(content, list) else [content]
        assert len({row["device"] for row in rows}) == 1, path
        assert all(row["processor"]["family"] for row in rows), path


def test_rows_of_two_devices_are_not_written_to_one_file(tmp_path: Path) -> None:
    rows = evidence.read([next((ROOT / "bench" / "results").glob("throughput-*.json"))])[:1]
    evidence.write(tmp_path / "a.json", rows)
    both = [*rows, rows[0] | {"device": "AMD EPYC (family 25, model 17)"}]
    with pytest.raises(ValueError, match=r"expected one device's; got AMD EPYC .* and AMD EPYC"):
        evidence.write(tmp_path / "b.json", both)
    assert not (tmp_path / "b.json").exists()
    with pytest.raises(ValueError, match="schema is 1, not 2"):
        evidence.check(rows[0] | {"schema": 1})


def test_command_line_keeps_no_folders() -> None:
    given = ["--arch", "deit_b", "--json", "/home/me/rows.json", "--images=/data/photos"]
    shown = "python bench/throughput.py --arch deit_b --json rows.json --images=photos"
    assert evidence.command_line(given) == shown
