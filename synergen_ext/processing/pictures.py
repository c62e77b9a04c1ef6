"""Picture files from people: opened within bounds, turned upright, flattened on white."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps

#: Most pixels that are decoded: 64 Mi is a picture of 8192 x 8192, 192 MiB of RGB.
MAX_PIXELS = 64 * 2**20
#: Formats that Pillow decodes itself; others (EPS) would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def load_picture(path: str | Path) -> Image.Image:
    """Open one picture file as RGB.

    The size is checked before any pixel is decoded. EXIF orientation is applied, transparency is laid on white, and
    of an animation the first frame is taken.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file, not a picture in one of ``FORMATS``, broken, or more than ``MAX_PIXELS`` pixels.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"picture {path} is not there")
    if not path.is_file():
        raise ValueError(f"picture {path} is not a file")
    return _decode(lambda: path, path)


def read_picture(data: bytes, name: str) -> Image.Image:
    """`load_picture` of a file's bytes; ``name`` is for messages.

    Raises:
        ValueError: as of `load_picture`.
    """
    return _decode(lambda: io.BytesIO(data), name)


def _decode(source: Callable[[], Path | IO[bytes]], path: Path | str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is lower
            with Image.open(source(), formats=FORMATS) as probe:
                _check_size(path, *probe.size)
                probe.verify()
            with Image.open(source(), formats=FORMATS) as picture:
                return upright_rgb(picture)
    except PictureTooLarge:
        raise
    except Image.DecompressionBombError:
        raise PictureTooLarge(f"picture {path} must have at most {MAX_PIXELS} pixels, got far more") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"picture {path} is not a picture in {', '.join(FORMATS)}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error...
        raise ValueError(f"picture {path} is broken: {error}") from error


class PictureTooLarge(ValueError):
    """More pixels than ``MAX_PIXELS``."""


def _check_size(path: Path | str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PictureTooLarge(f"picture {path} must have at most {MAX_PIXELS} pixels, got {width} x {height}")


def upright_rgb(picture: Image.Image) -> Image.Image:
    """A picture in any of Pillow's modes as RGB, EXIF orientation applied, transparency laid on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return picture.point(lambda v: v * (1 / 256)).convert("L").convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    return picture.convert("RGB")


def fit_on_white(picture: Image.Image, width: int, height: int) -> Image.Image:
    """An RGB picture, scaled to fit into ``width x height`` and laid on the middle of a white page of that size."""
    if picture.size == (width, height):
        return picture
    scale = min(width / picture.width, height / picture.height)
    inner = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    page = Image.new("RGB", (width, height), "white")
    corner = (width - inner[0]) // 2, (height - inner[1]) // 2
    page.paste(picture.resize(inner, Image.Resampling.BICUBIC), corner)
    return page
