"""Files that are whole under their name, or not there: written beside, flushed, renamed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file; after a crash it is the old one or the new one. Raises OSError."""
    with replacing(path) as partial:
        partial.write_text(text)


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """`write_atomically` for a safetensors file.

    Raises ValueError where a value is not finite: a checkpoint of that would be the newest one.
    """
    from safetensors.torch import save_file

    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if wild := [name for name, tensor in dense.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"weights: NaN or infinity in {len(wild)} of {len(dense)} tensors, such as {wild[0]}; "
            f"{path} is not written"
        )
    with replacing(path) as partial:
        save_file(dense, partial, metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file that takes the place of `path` once it is whole and on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within: a full or failing disk is an OSError that names a file, whoever writes."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except SafetensorError as error:  # "I/O error: No space left on device (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except RuntimeError as error:  # torch.save: "unexpected pos 704 vs 598"
        cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
