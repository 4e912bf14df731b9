"""Image files: those below a folder, and their pixels, upright and as 8-bit RGB.

Every image of this package is decoded by `load_image`, from a folder, a shard or a dataset alike.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, ImageFile

from deit.data.limits import limit, not_regular

# torchvision's, and .gif.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)

# The decoders tried, whatever a file is called. Not all of Pillow's: its EPS reader, for one,
# hands the file to another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Modes that hold one 16-bit channel; Pillow's own conversion to RGB clips them at 255, which
# turns most of such an image white.
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")

# What makes an image upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """A file that is no image, or not a whole one; `path` and `reason` say which and why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def is_image_name(name: str) -> bool:
    """Whether a file is called like an image (see SUFFIXES).

    "._photo.jpg" is not: macOS keeps the attributes of photo.jpg under that name, on disks and in
    archives that others read.
    """
    base = name.rpartition("/")[2]
    return not base.startswith("._") and os.path.splitext(base)[1].lower() in SUFFIXES


def find_images(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The image files that `source` names: a file, a folder (searched recursively), or several.

    Files in folders are chosen by suffix, whatever its case (see SUFFIXES; macOS's "._" files
    are none), and sorted; links to folders are followed, except back to one that they are in. A
    file given by name is taken whatever it is called. Duplicates count once.

    Raises ValueError for a path that does not exist and a folder without images, and OSError for
    a folder that may not be read.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if not sources:
        raise ValueError("images: expected at least one file or folder; got none")
    found: dict[Path, None] = {}
    for path in map(Path, sources):
        if path.is_dir():
            inside = sorted(_search(path, ()))
            if not inside:
                known = " ".join(sorted(SUFFIXES))
                raise ValueError(f"images: no image file in folder {path} (looked for {known})")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise ValueError(f"images: no such file or folder: {path}")
    return list(found)


def _search(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Images below a folder; `above`: the folders that it is in, by device and inode."""
    about = os.stat(folder)
    own = about.st_dev, about.st_ino
    if own in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if path.is_dir():  # a link to a file counts; a link to nothing or to itself does not
                yield from _search(path, (*above, own))
            elif is_image_name(entry.name):
                yield path


def load_image(
    source: str | Path | BinaryIO | bytes, name: str | None = None, *, at_least: int | None = None
) -> Image.Image:
    """Decode one file to 8-bit RGB, upright by its EXIF orientation; the first frame of several.

    `source` is a path, or an open file or bytes called `name` in messages. Palettes, grey, CMYK
    and 16-bit grey are converted; an alpha channel is dropped, as torchvision's and timm's loaders
    do. EXIF that cannot be read turns nothing.

    `at_least`: pixels of the short side that suffice. A JPEG of twice that or more is decoded at
    1/2, 1/4 or 1/8, by a shorter inverse transform of each block. Its pixels are others than those
    of the whole image made smaller. None: the whole image.

    Raises UnreadableImage, a ValueError, with the reason: not a regular file, not an image,
    truncated, larger than Pillow's limit against decompression bombs or in a file larger than
    DEIT_MAX_IMAGE_BYTES, or of a mode without a defined range.
    """
    path = source if isinstance(source, (str, Path)) else name or "image"
    with _unreadable(path):
        if isinstance(source, bytes):
            check_size(len(source), path)
            source = io.BytesIO(source)
        elif isinstance(source, (str, Path)):
            _check_file(Path(source))
        with Image.open(source, formats=FORMATS) as image:
            return _decoded(image, path, at_least)


def of_pillow(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB of an image that Pillow has opened or made.

    One that is as it was opened is decoded as `load_image` does, upright. One that was made from
    another keeps its EXIF, so nothing says whether it was turned already: it is taken as it is.

    Raises UnreadableImage as `load_image` does.
    """
    with _unreadable(name):
        if isinstance(image, ImageFile.ImageFile):
            return _decoded(image, name, None)
        _check_pixels(image, name)
        return to_rgb(image, name)


@contextmanager
def _unreadable(path: str | Path) -> Iterator[None]:
    """Within: whatever a decoder raises becomes an UnreadableImage with its reason."""
    try:
        yield
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage(path, "not an image in a known format") from None
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, EOFError, struct.error, zlib.error, ... on
        # damaged files; whatever it is, it goes into the report and the other files go on.
        reason = getattr(error, "strerror", None) or str(error) or "no reason given"
        raise UnreadableImage(path, f"{reason} ({type(error).__name__})") from error


def _decoded(image: Image.Image, path: str | Path, at_least: int | None) -> Image.Image:
    _check_pixels(image, path)
    if at_least is not None:
        image.draft(None, (at_least, at_least))  # sets the decoder's scale; JPEGs' alone
    return to_rgb(_upright(image), path)


def keep_memory(bytes_: int = 256 << 20) -> None:
    """Let Pillow keep up to so much of the memory of images that are gone, for those to come.

    It hands memory back after each image, and every page of the next one is then a fault: of a
    photograph of 12 megapixels, decoded and copied, that was 31 ms of 63 on a Zen 4. The setting
    is of the whole process, so it is for processes that do nothing but decode.
    """
    core: Any = Image.core
    core.set_blocks_max(bytes_ // core.get_block_size())


def _check_file(path: Path) -> None:
    what = not_regular(path)
    if what == "a folder":
        raise IsADirectoryError(None, "Is a directory")
    if what is not None:
        raise UnreadableImage(path, f"expected a regular file; got {what}")
    check_size(os.path.getsize(path), path)


def check_size(size: int, path: str | Path) -> None:
    """Raises UnreadableImage for an image of more than DEIT_MAX_IMAGE_BYTES, before it is read."""
    most = limit("DEIT_MAX_IMAGE_BYTES")
    if size > most:
        raise UnreadableImage(path, f"{size} bytes exceed DEIT_MAX_IMAGE_BYTES={most}")


def _check_pixels(image: Image.Image, path: str | Path) -> None:
    most = Image.MAX_IMAGE_PIXELS
    # Pillow itself only warns up to twice its limit.
    if most is not None and image.width * image.height > most:
        raise UnreadableImage(
            path, f"{image.width} x {image.height} pixels exceed Pillow's limit of {most}"
        )
    if not image.width or not image.height:
        raise UnreadableImage(path, f"{image.width} x {image.height} pixels are no image")


def _upright(image: Image.Image) -> Image.Image:
    """The image's pixels, turned as its EXIF orientation says, if that can be read.

    Pillow's `exif_transpose` raises where EXIF is broken, though the pixels are whole.
    """
    image.load()  # so that what is raised below is of the EXIF alone
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        turn = _TURNS.get(orientation)
    except Exception:  # SyntaxError, struct.error, TypeError, ...
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    """8-bit RGB of an image of any mode; raises UnreadableImage for one without a known range."""
    if image.mode in _SIXTEEN_BIT:
        image = image.point(lambda value: value * (1 / 256), "L")
    elif image.mode in ("I", "F"):
        raise UnreadableImage(path, f"mode {image.mode!r} has no defined range of values")
    elif image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency; RGBA reads both kinds
    return image.convert("RGB")
