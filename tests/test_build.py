"""setup.py's build: what happens with no compiler, with a failing one, and to the import name."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import instruction_sets
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="setup.py is not here: the tests run on a wheel"
)


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("fused_deit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bare(tmp_path):
    """An environment with no program on PATH."""
    empty = tmp_path / "bin"
    empty.mkdir()
    return {"PATH": str(empty)}


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(body)}")
    path.chmod(0o755)


def test_without_a_compiler_the_build_succeeds_and_records_why(build, bare, tmp_path, capsys):
    target = tmp_path / "out"
    record = build.build_all(target, tmp_path / "temp", bare)
    for kind in ("cpu", "cuda"):
        assert record["libraries"][kind]["built"] is False
        assert "no C++ compiler" in record["libraries"][kind]["reason"]
    assert json.loads((target / build.build_record.FILE).read_text()) == record
    assert build.build_record.read(target) == record
    assert "the cpu library is NOT built: no C++ compiler" in capsys.readouterr().err


def test_required_without_a_compiler_fails_with_the_reason(build, bare, tmp_path):
    for mode, kind in (("required", "cuda"), ("cpu", "cpu")):
        environment = {**bare, "FUSED_DEIT_BUILD": mode}
        with pytest.raises(SystemExit, match=f"{kind} library was not built: no C.. compiler"):
            build.build_all(tmp_path / "out", tmp_path / "temp", environment)
    assert (tmp_path / "out" / build.build_record.FILE).is_file()


def test_none_builds_nothing_and_removes_what_was_there(build, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    old = target / "_cpu.abi3.so"
    old.write_bytes(b"old")
    environment = {**os.environ, "FUSED_DEIT_BUILD": "none"}
    record = build.build_all(target, tmp_path / "temp", environment)
    assert not old.exists()
    assert "FUSED_DEIT_BUILD=none" in record["libraries"]["cpu"]["reason"]


def test_every_source_is_built(build, tmp_path):
    torch = build.find_torch()
    cpu = build.cpu_ninja("c++", torch, tmp_path / "library.so")
    cuda = build.cuda_ninja("c++", tmp_path / "bin" / "nvcc", torch, tmp_path / "library.so")
    for text, folder in ((cpu, "cpu"), (cuda, "cuda")):
        named = {line.split()[-1] for line in text.splitlines() if line.startswith("build ")}
        schemas = ROOT / "csrc" / "schemas" / f"{folder}.cpp"
        for source in (*(ROOT / "csrc" / folder).glob("*.c*"), schemas):
            assert str(source) in named
        objects = [line.split()[1] for line in text.splitlines() if line.startswith("build ")]
        assert len(objects) == len(set(objects))


def test_a_library_has_the_sets_of_its_kind_of_processor(build):
    floats, eights = build.instruction_sets("aarch64", "linux")
    assert list(floats) == ["neon_bf16", "neon", "portable"]
    assert list(eights) == ["neon_i8mm", "neon_dotprod", "neon", "portable"]
    floats, eights = build.instruction_sets("AMD64", "win32")
    assert list(floats) == ["avx512_bf16", "avx512", "avx2", "portable"]
    for machine, system in (("arm64", "darwin"), ("riscv64", "linux")):
        assert build.instruction_sets(machine, system) == ({"portable": ""}, {"portable": ""})
    assert tuple(build.CPU_SETS) == instruction_sets.SETS
    assert tuple(build.INT8_SETS) == instruction_sets.INT8_SETS


def test_an_unknown_mode_is_refused(build):
    with pytest.raises(SystemExit, match=r"FUSED_DEIT_BUILD: expected one of auto.*got 'yes'"):
        build.mode({"FUSED_DEIT_BUILD": "yes"})
    assert build.mode({}) == build.mode({"FUSED_DEIT_BUILD": ""}) == "auto"


def test_the_compilers_error_becomes_the_reason(build, bare, tmp_path):
    folder = Path(bare["PATH"])
    program(
        folder, "c++", "import sys; print('ops.cpp:1: fatal error: no such header'); sys.exit(1)"
    )
    (folder / "ninja").symlink_to(build.find_ninja(os.environ))
    # Ninja runs its commands through /bin/sh, whatever PATH is.
    with pytest.raises(build.NotBuilt, match=r"the compiler failed: .*no such header"):
        build.build_library("cpu", tmp_path / "_cpu.abi3.so", tmp_path / "temp", bare)


def test_the_compiler_is_cxx_or_found(build, bare):
    folder = Path(bare["PATH"])
    with pytest.raises(build.NotBuilt, match="named by CXX, 'mycc', was not found"):
        build.find_compiler({**bare, "CXX": "mycc"})
    program(folder, "g++", "")
    assert build.find_compiler(bare) == "g++"
    program(folder, "mycc", "")
    assert build.find_compiler({**bare, "CXX": "mycc -pipe"}) == "mycc -pipe"


def test_nvcc_is_found_by_home_then_default_then_path(build, bare, tmp_path):
    default = str(tmp_path / "nowhere")
    with pytest.raises(build.NotBuilt, match="no nvcc: not in CUDA_HOME"):
        build.find_nvcc(bare, default)
    with pytest.raises(build.NotBuilt, match="CUDA_HOME is '/absent'"):
        build.find_nvcc({**bare, "CUDA_HOME": "/absent"}, default)
    program(Path(bare["PATH"]), "nvcc", "")
    assert build.find_nvcc(bare, default) == Path(bare["PATH"]) / "nvcc"
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    program(home / "bin", "nvcc", "")
    assert build.find_nvcc(bare, str(home)) == home / "bin" / "nvcc"
    assert build.find_nvcc({**bare, "CUDA_PATH": str(home)}, default) == home / "bin" / "nvcc"


def test_the_cuda_build_needs_a_torch_with_cuda(build, bare, tmp_path, monkeypatch):
    program(Path(bare["PATH"]), "c++", "")
    program(Path(bare["PATH"]), "nvcc", "")
    plain = build.Torch("2.11.0+cpu", None, tmp_path, tmp_path)
    monkeypatch.setattr(build, "find_torch", lambda: plain)
    monkeypatch.setattr(build, "find_nvcc", lambda env: Path(bare["PATH"]) / "nvcc")
    with pytest.raises(build.NotBuilt, match=r"torch 2\.11\.0\+cpu .* has no CUDA to link to"):
        build.build_library("cuda", tmp_path / "_cuda.abi3.so", tmp_path / "temp", bare)


def test_the_build_asks_for_the_oldest_interface_and_no_run_path(build, tmp_path):
    torch = build.Torch("2.15.0", "13.0", Path("/torch/include"), Path("/torch/lib"))
    cpu = build.cpu_ninja("g++", torch, tmp_path / "_cpu.abi3.so")
    cuda = build.cuda_ninja("g++", Path("/cuda/bin/nvcc"), torch, tmp_path / "_cuda.abi3.so")
    for text in (cpu, cuda):
        assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in text
        assert "rpath" not in text
    assert "torch_cuda" not in cpu
    for code in ("sm_80", "sm_90a", "sm_100", "sm_120", "code=compute_100"):
        assert code in cuda


def test_every_package_is_listed(build):
    listed = set(build.packages())
    expected = {"deit", "deit.fused_vit", "deit.kernels", "deit.kernels.attention"}
    assert expected <= listed
    for folder in ROOT.glob("deit/**/__init__.py"):
        assert ".".join(folder.parent.relative_to(ROOT).parts) in listed
    assert not any(name == "kernels" or name.startswith("kernels.") for name in listed)


def import_kernels(path: Path) -> subprocess.CompletedProcess[str]:
    code = "import kernels, kernels.layer; print(kernels.__file__, kernels.layer.WHO)"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,  # the folder kernels/ comes first on sys.path
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_import_kernels_from_the_root_gives_the_other_package(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.layer import WHO\n")
    (package / "layer.py").write_text("WHO = 'the PyPI package'\n")
    result = import_kernels(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split(" ", 1) == [str(package / "__init__.py"), "the PyPI package\n"]


@pytest.mark.skipif(
    any((Path(p) / "kernels").is_dir() for p in sys.path if Path(p or ".").resolve() != ROOT),
    reason="the PyPI package kernels is installed",
)
def test_import_kernels_from_the_root_explains_itself(tmp_path):
    result = import_kernels(tmp_path)
    assert result.returncode != 0
    assert "imported as deit.kernels" in result.stderr
    # What transformers asks before it goes on without the package.
    code = "import kernels; assert not hasattr(kernels, '__version__'); kernels.get_kernel"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "ImportError: the folder kernels/" in result.stderr
