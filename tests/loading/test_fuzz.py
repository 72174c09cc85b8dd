"""Image files that are not what they claim: each is decoded or refused, none hangs, none ends the process."""

import io
import random

import pytest

from loading import images
from tests.test_data import encoded, picture

KINDS = {
    "JPEG": dict(quality=80),
    "PNG": dict(),
    "WEBP": dict(quality=80),
    "GIF": dict(),
}


def mutated(content, draw):
    """Bits flipped, an end cut off, a stretch overwritten, or another file's header."""
    content = bytearray(content)
    how = draw.randrange(4)
    if how == 0:
        for _ in range(draw.randint(1, 30)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == 1:
        del content[draw.randrange(len(content)) :]
    elif how == 2:
        start = draw.randrange(len(content))
        content[start : start + draw.randint(1, 60)] = draw.randbytes(draw.randint(0, 60))
    else:
        header = encoded(picture(1), draw.choice(list(KINDS)))[: draw.randint(1, 24)]
        content[: len(header)] = header
    return bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_mutated_files(kind):
    draw = random.Random(kind)
    originals = [encoded(picture(i, 40, 50), kind, **KINDS[kind]) for i in range(5)]
    decoded = refused = 0
    for i in range(500):
        try:
            image = images.decode({"bytes": mutated(originals[i % 5], draw), "path": None})
        except ValueError as error:
            refused += 1
            assert str(error)
        else:
            decoded += 1
            assert image.mode == "RGB" and image.width * image.height <= images.PIXELS
    assert decoded > 20 and refused > 100


def test_files_that_are_no_images():
    for content in (b"", b"\0" * 100, b"GIF89a", b"%PDF-1.4 ...", io.BytesIO().getvalue(), b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ValueError):
            images.decode({"bytes": content, "path": None})
    with pytest.raises(ValueError, match="No such file"):
        images.decode({"bytes": None, "path": "/no/such/file.png"})
