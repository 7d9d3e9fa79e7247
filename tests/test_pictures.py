"""Pictures are opened as people see them (examples/pictures.py)."""

import numpy as np
import pictures
import pytest
from PIL import Image

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
GREY = np.round(255 * RAMP).astype(np.uint8)


def opened(path, image, **options):
    image.save(path, **options)
    result = pictures.open_picture(path)
    assert result.mode == "RGB"
    return np.asarray(result).astype(int)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", (65535 * RAMP).astype(np.uint16)),
        ("a.tif", (65535 * RAMP).astype(np.uint16)),
        ("a.png", (4095 * RAMP).astype(np.uint16)),  # Twelve bits, as in medicine.
        ("a.tif", RAMP.astype(np.float32)),
        ("a.tif", (1000 * RAMP - 500).astype(np.float32)),
        ("a.tif", (100_000 * RAMP).astype(np.int32)),
    ],
)
def test_deep_pictures_are_scaled(tmp_path, name, values):
    got = opened(tmp_path / name, Image.fromarray(values))
    assert np.abs(got - GREY[:, :, None]).max() <= 1


def test_deep_pictures_of_one_value_or_with_nan(tmp_path):
    assert not opened(tmp_path / "a.png", Image.fromarray(np.zeros((4, 4), np.uint16))).any()
    assert (opened(tmp_path / "a.png", Image.fromarray(np.full((4, 4), 9, np.uint16))) == 255).all()
    values = RAMP.astype(np.float32)
    values[0, 0], values[0, 1] = np.nan, np.inf
    got = opened(tmp_path / "a.tif", Image.fromarray(values))
    assert (got[0, 0, 0], got[0, 1, 0], got[7, 7, 0]) == (0, 255, 255)
    with pytest.raises(ValueError, match="no finite value"):
        opened(tmp_path / "a.tif", Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def test_eight_bits_stay_as_they_are(tmp_path):
    dark = (GREY // 4).astype(np.uint8)
    assert (opened(tmp_path / "a.png", Image.fromarray(dark)) == dark[:, :, None]).all()
    assert opened(tmp_path / "a.png", Image.fromarray(dark > 20)).max() == 255
    assert opened(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))[0, 0, 0] > 200


def test_exif_orientation(tmp_path):
    wide = Image.fromarray(np.array([[255, 0, 0, 0]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by 90 degrees.
    got = opened(tmp_path / "a.png", wide, exif=exif)
    assert got.shape == (4, 1, 3)
    assert got[:, 0, 0].tolist() == [255, 0, 0, 0]


def test_transparent_parts_are_white(tmp_path):
    red, hidden = (255, 0, 0), (0, 0, 200)  # What is seen, and a colour under full transparency.
    rgba = Image.new("RGBA", (2, 1), (*hidden, 0))
    rgba.putpixel((0, 0), (*red, 255))
    wanted = [list(red), [255, 255, 255]]
    assert opened(tmp_path / "a.png", rgba)[0].tolist() == wanted
    assert opened(tmp_path / "a.webp", rgba, lossless=True, exact=True)[0].tolist() == wanted
    palette = Image.new("P", (2, 1))
    palette.putpalette([*red, *hidden])
    palette.putpixel((1, 0), 1)
    assert opened(tmp_path / "a.gif", palette, transparency=1)[0].tolist() == wanted
    rgb = Image.new("RGB", (2, 1), hidden)
    rgb.putpixel((0, 0), red)
    assert opened(tmp_path / "a.png", rgb, transparency=hidden)[0].tolist() == wanted
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((0, 0), (9, 255))
    assert opened(tmp_path / "a.png", grey)[0].tolist() == [[9] * 3, [255] * 3]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert opened(tmp_path / "a.png", half)[0, 0].tolist() == pytest.approx([127] * 3, abs=1)


def test_what_cannot_be_read_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "good.jpg")
    content = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    paths = [tmp_path / name for name in ("cut.jpg", "good.jpg", "empty.png", "page.jpg", "none.jpg")]
    for workers in (0, 3):
        assert pictures.unreadable(paths, workers) == {path for path in paths if path.name != "good.jpg"}
    with pytest.raises(ValueError, match=r"Expected a picture that PIL reads, but .*cut\.jpg is not: "):
        pictures.open_picture(tmp_path / "cut.jpg")
