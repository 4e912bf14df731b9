"""csrc/cuda's calls of cuBLASLt, answered by a stub: what is asked for, and what comes of it."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native import sanitize

from deit.kernels import explain, gelu_mlp, linear
from deit.kernels.engine import dispatch, registry
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.linear import ACTIVATIONS
from deit.kernels.prove import calls, oracle
from deit.kernels.prove.calls import Draw, Size

TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
DTYPES = tuple(TYPES)
SIZE, ODD = Size(2, 21, 72, heads=2, hidden=136), Size(1, 17, 34, heads=2, hidden=37, width=35)


@pytest.fixture
def asked(cublaslt, emulated):
    """() -> what the stub was asked for since the last call, without "create"."""

    def lines():
        return [line for line in cublaslt.stub_log().decode().splitlines() if line != "create"]

    cublaslt.stub_fault(b"")
    cublaslt.stub_workspace(0)
    lines()
    yield lines
    assert cublaslt.stub_alive() == 0  # every descriptor was given back


run = functools.partial(linear, impl="cublaslt")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear", "gelu_mlp"])
def test_the_rule(name, dtype, asked):
    operator = OPERATORS[name]
    for size, form in ((SIZE, "every"), (ODD, "every"), (ODD, "least"), (SIZE, "inference")):
        draws = [calls.build(name, Draw("random", dtype, number=n), size, form) for n in range(2)]
        given = [operator.prepare(**draw.inputs, **draw.options) for draw in draws]
        kernel = lambda *arguments: dispatch.run(operator, arguments, "cublaslt")
        oracle.check_draws(kernel, operator.reference, given, name=f"{name} {form}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_needs_no_second_kernel_is_one_call(dtype, asked):
    """Bias, and a residual as C with beta 1; the result is the stub's alone."""
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((3, 31, 40), (24, 40), (24,)))
    residual, kind = torch.randn(3, 31, 24), TYPES[dtype]
    finished = []
    for options, epilogue, adds, out in (
        ({}, 1, False, kind),
        ({"bias": bias}, 4, False, kind),
        ({"residual": residual.to(dtype)}, 1, True, kind),
        ({"bias": bias, "residual": residual.to(dtype)}, 4, True, kind),
        ({"bias": bias, "residual": residual}, 4, True, 0),
    ):
        found = run(x, weight, **options)
        matmul = asked()[-1]
        assert matmul == (f"matmul epilogue={epilogue} beta={int(adds)} types={kind},{out} "
                          f"in_place={int(not adds)} workspace=0")  # fmt: skip
        finished.append(found)
        arguments = OPERATORS["linear"].prepare(x, weight, **options)
        oracle.check(found, OPERATORS["linear"].reference, arguments, name=str(list(options)))
    assert finished[-1].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, asked):
    """The library's own GELU, by tanh, serves bf16; a second kernel makes all others."""
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((3, 30, 40), (24, 40), (24,)))
    for activation in ACTIVATIONS:
        found = run(x, weight, bias, activation=activation)
        own = activation == "gelu_tanh" and dtype == torch.bfloat16
        assert f"epilogue={36 if own else 4} " in asked()[-1]
        arguments = (x, weight, bias, activation, None, None, None)
        oracle.check(found, OPERATORS["linear"].reference, arguments, name=activation)
    run(x, weight, bias, activation="gelu_tanh", residual=torch.randn(3, 30, 24).to(dtype))
    assert "epilogue=4 beta=0" in asked()[-1]


def test_an_algorithm_is_chosen_once_a_shape(asked):
    """Another shape, stride, alignment, epilogue or type is another; sums are parted in fp32."""
    x, weight = torch.randn(50, 41), torch.randn(19, 40)
    calls_ = {
        "first": lambda: run(x[:32, :40], weight),
        "rows": lambda: run(x[:31, :40], weight),
        "stride": lambda: run(x[:32, :40].contiguous(), weight),
        "alignment": lambda: run(x[:32, 1:], weight),
        "bias": lambda: run(x[:32, :40], weight, weight[:, 0].contiguous()),
        "residual": lambda: run(x[:32, :40], weight, residual=torch.ones(32, 20)[:, :19]),
        "dtype": lambda: run(x[:32, :40].half(), weight.half()),
    }
    for call in calls_.values():
        call()
        assert [line.split()[0] for line in asked()] == ["heuristic", "matmul"]
    for call in calls_.values():
        call()
        assert [line.split()[0] for line in asked()] == ["matmul"]
    run(x[:29, :40], weight)
    assert asked()[0] == "heuristic reductions=2"  # COMPUTE_TYPE, beside none


def test_a_workspace_is_what_the_algorithm_asks_for(cublaslt, asked):
    cublaslt.stub_workspace(12345)  # the stub writes over all of it
    x, weight = torch.randn(28, 40), torch.randn(19, 40)
    torch.testing.assert_close(run(x, weight), x @ weight.T)
    assert asked()[-1].endswith("workspace=12345")
    cublaslt.stub_workspace((32 << 20) + 1)
    with pytest.raises(RuntimeError, match="AlgoGetHeuristic: CUBLAS_STATUS_NOT_SUPPORTED"):
        run(x[:27], weight)


def test_odd_memory_is_read_or_copied(asked):
    """Rows that overlap have no leading dimension; a transposed weight has no contiguous rows."""
    x, weight = torch.randn(2, 3, 5, 16), torch.randn(16, 8).T
    residual = torch.randn(5, 2, 3, 8).permute(1, 2, 0, 3)
    expected = residual + x @ weight.T
    torch.testing.assert_close(run(x, weight, residual=residual), expected)
    row = torch.randn(16).expand(6, 16)
    torch.testing.assert_close(run(row, weight), row @ weight.T)
    added = torch.randn(8).expand(6, 8)
    torch.testing.assert_close(run(row, weight, residual=added), added + row @ weight.T)
    assert run(x[:0], weight).shape == (0, 3, 5, 8)
    asked()


def test_a_failing_call_is_named(cublaslt, asked):
    x, weight = torch.randn(26, 40), torch.randn(19, 40)
    for fault, words in {
        "heuristic": r"cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_NOT_SUPPORTED \(15\)",
        "heuristic:none": r"no algorithm for 26 x 40 by 19 x 40, addresses at multiples of \d+",
        "attribute": r"cublasLtMatmulDescSetAttribute: CUBLAS_STATUS_INVALID_VALUE \(7\)",
        "matmul": r"cublasLtMatmul: CUBLAS_STATUS_NOT_SUPPORTED \(15\) for 26 x 40 by 19 x 40",
    }.items():
        cublaslt.stub_fault(fault.encode())
        with pytest.raises(RuntimeError, match=words):
            run(x, weight)
        cublaslt.stub_fault(b"")
        asked()
    torch.testing.assert_close(run(x, weight), x @ weight.T)
    asked()


def test_it_is_asked_for_by_name_alone(asked, monkeypatch):
    """It has the products and nothing else; "auto" takes it where it was measured, so nowhere."""
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    assert registry.KERNELS["cublaslt"] == {"linear", "gelu_mlp"}
    assert explain("linear", x, weight).reasons["cublaslt"] == []
    assert explain("linear", x[:, :0], weight[:, :0]).reasons["cublaslt"] == [
        "an empty axis to sum over"
    ]
    assert explain("layer_norm", x, x[0], x[0]).reasons["cublaslt"] == [
        "it has no layer_norm kernel"
    ]
    with pytest.raises(NotImplementedError, match="forward-only"):
        run(x.requires_grad_(), weight)
    x = x.detach()
    run(x, weight)
    gelu_mlp(x, weight, None, weight, None, impl="cublaslt")
    assert len(asked()) > 0
    linear(x, weight)
    assert asked() == []


def test_without_the_library_there_is_a_reason(library):
    """In a process that has not loaded it."""
    code = f"""
import ctypes, torch
library = ctypes.CDLL({str(library)!r})
library.deit_cuda_why_no_cublaslt.restype = ctypes.c_char_p
print(library.deit_cuda_why_no_cublaslt().decode())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "no stub of cuBLASLt is loaded"


def test_nvidias_own_takes_the_descriptions():
    """Descriptors need no GPU: the library that torch has loaded takes each attribute's size."""
    try:
        library = ctypes.CDLL("libcublasLt.so.13", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        pytest.skip("torch has not loaded libcublasLt.so.13")
    desc, layout, wants = (ctypes.c_void_p() for _ in range(3))
    sizes = ctypes.c_uint64(768), ctypes.c_uint64(50432), ctypes.c_int64(768)

    def take(setter, of, attribute, value):
        return getattr(library, f"cublasLt{setter}SetAttribute")(
            of, attribute, ctypes.byref(value), ctypes.sizeof(value)
        )

    assert library.cublasLtMatmulDescCreate(ctypes.byref(desc), 68, 0) == 0
    assert library.cublasLtMatrixLayoutCreate(ctypes.byref(layout), 14, *sizes) == 0
    assert library.cublasLtMatmulPreferenceCreate(ctypes.byref(wants)) == 0
    pointer, word = ctypes.c_void_p(4096), ctypes.c_uint32(4)
    assert take("MatmulDesc", desc, 3, ctypes.c_int32(1)) == 0
    assert take("MatmulDesc", desc, 7, word) == take("MatmulDesc", desc, 8, pointer) == 0
    assert take("MatmulPreference", wants, 1, ctypes.c_uint64(32 << 20)) == 0
    assert not any(take("MatmulPreference", wants, which, word) for which in (3, 5, 6, 7, 8))
    assert take("MatmulPreference", wants, 3, ctypes.c_uint64(2)) == 7  # an invalid value
    library.cublasLtMatmulDescDestroy(desc)
    library.cublasLtMatrixLayoutDestroy(layout)
    library.cublasLtMatmulPreferenceDestroy(wants)


def test_the_numbers_are_nvidias(tmp_path):
    """csrc/cuda/cublaslt.h against the header that torch's own wheels bring."""
    nvidia = Path(torch.__file__).parents[1] / "nvidia"
    headers = [path.parent for path in nvidia.glob("*/include/cublasLt.h")]
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not headers or not (toolkit / "crt").is_dir():
        pytest.skip("no cublasLt.h, or none of the toolkit's headers that it includes")
    same = {
        "kSuccess": "CUBLAS_STATUS_SUCCESS", "kOpT": "CUBLAS_OP_T",
        "kCompute32F": "CUBLAS_COMPUTE_32F",
        "kReal32F": "CUDA_R_32F", "kReal16F": "CUDA_R_16F", "kReal16BF": "CUDA_R_16BF",
        "kDescTransA": "CUBLASLT_MATMUL_DESC_TRANSA",
        "kDescEpilogue": "CUBLASLT_MATMUL_DESC_EPILOGUE",
        "kDescBiasPointer": "CUBLASLT_MATMUL_DESC_BIAS_POINTER",
        "kEpilogueDefault": "CUBLASLT_EPILOGUE_DEFAULT",
        "kEpilogueBias": "CUBLASLT_EPILOGUE_BIAS", "kEpilogueGelu": "CUBLASLT_EPILOGUE_GELU",
        "(kEpilogueBias | kEpilogueGelu)": "CUBLASLT_EPILOGUE_GELU_BIAS",
        "kPrefMaxWorkspaceBytes": "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES",
        "kPrefReductionSchemeMask": "CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK",
        "kPrefMinAlignmentBytes": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES",
        "kPrefMinAlignmentBytes + 1": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES",
        "kPrefMinAlignmentBytes + 2": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES",
        "kPrefMinAlignmentBytes + 3": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES",
        "kReductionComputeType": "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE",
        "sizeof(Algo)": "sizeof(cublasLtMatmulAlgo_t)",
        "sizeof(Heuristic)": "sizeof(cublasLtMatmulHeuristicResult_t)",
        "offsetof(Heuristic, workspace_size)":
            "offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize)",
        "offsetof(Heuristic, state)": "offsetof(cublasLtMatmulHeuristicResult_t, state)",
    }  # fmt: skip
    lines = [f"static_assert(long({own}) == long({nvidias}));" for own, nvidias in same.items()]
    source = tmp_path / "same.cpp"
    source.write_text(
        f'#include "{sanitize.CUDA / "cublaslt.h"}"\n#include <cublasLt.h>\n'
        "using namespace deit::cublaslt;\n" + "\n".join(lines)
    )
    compiler = sanitize.load_setup().find_compiler(os.environ)
    for folder in headers:
        command = f"{compiler} -std=c++20 -fsyntax-only -I{folder} -I{toolkit} {source}"
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
