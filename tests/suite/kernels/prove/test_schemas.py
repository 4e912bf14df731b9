"""The schemas that C++ defines are Python's."""

from __future__ import annotations

import ctypes

import pytest
import torch

from deit.kernels import layer_norm
from deit.kernels.engine import native
from deit.kernels.prove import schemas

pytestmark = pytest.mark.skipif(
    not schemas.FOLDER.is_dir(), reason="csrc/ is not here: the tests run on a wheel"
)


@pytest.mark.parametrize("kind", schemas.LIBRARIES)
def test_cpp_has_the_schemas_of_python(kind):
    written = schemas.path(kind).read_text(encoding="utf-8")
    assert written == schemas.text(kind), "run `python -m deit.kernels.prove.schemas`"
    assert written.count(",\n") == len(schemas.in_library(kind)) > 4


@pytest.mark.skipif(bool(native.why_not("cpu")), reason=f"{native.why_not('cpu')}")
def test_what_python_has_defined_a_library_does_not_define_again():
    library = ctypes.CDLL(str(native.FOLDER / native.LIBRARIES["cpu"]))
    assert library.deit_cpu_define_schemas() == 1
    assert layer_norm(torch.ones(2, 8), torch.ones(8), impl="cpu").eq(0).all()
