"""The schemas that C++ defines are Python's."""

from __future__ import annotations

import pytest

from deit.kernels.prove import schemas

pytestmark = pytest.mark.skipif(
    not schemas.FOLDER.is_dir(), reason="csrc/ is not here: the tests run on a wheel"
)


@pytest.mark.parametrize("kind", schemas.LIBRARIES)
def test_cpp_has_the_schemas_of_python(kind):
    written = schemas.path(kind).read_text(encoding="utf-8")
    assert written == schemas.text(kind), "run `python -m deit.kernels.prove.schemas`"
    assert written.count(",\n") == len(schemas.in_library(kind)) > 4
