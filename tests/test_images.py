"""Every kind of picture becomes upright 8-bit RGB; everything else becomes one clear ImageError."""

from __future__ import annotations

import io
import socket
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from llava import images
from llava.images import ImageError, load_image
from llava.utils import UserError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


# --- kinds of pictures


def test_rgb_is_returned_unchanged(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png")):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), values)


def test_alpha_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.getpixel((0, 0)) == RED
    assert loaded.getpixel((1, 0)) == WHITE
    assert loaded.getpixel((2, 0)) == (127, 127, 127)


def test_grey_with_alpha_is_laid_on_white(tmp_path):
    image = Image.new("LA", (2, 1), (40, 255))
    image.putpixel((1, 0), (40, 0))
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(40, 40, 40), WHITE]


@pytest.mark.parametrize("extension", ["png", "tiff", "ppm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, extension):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"a.{extension}"
    if extension == "ppm":
        path.write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    grey = np.asarray(load_image(path))[..., 0]
    np.testing.assert_array_equal(grey, [[0, 1, 128, 255]])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_samples_are_stretched_over_the_values_found(tmp_path, dtype):
    Image.fromarray(np.array([[-1000, 0, 1000]], dtype=dtype)).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.tiff"))[..., 0], [[0, 128, 255]])


def test_float_samples_that_are_not_numbers_do_not_spoil_the_rest(tmp_path):
    Image.fromarray(np.array([[np.nan, 0, 1, np.inf]], dtype=np.float32)).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.tiff"))[..., 0], [[0, 0, 255, 255]])


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


def test_palette_and_its_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "transparent.png", transparency=0)
    opaque, transparent = load_image(tmp_path / "opaque.png"), load_image(tmp_path / "transparent.png")
    assert [opaque.getpixel((x, 0)) for x in range(2)] == [RED, BLUE]
    assert [transparent.getpixel((x, 0)) for x in range(2)] == [WHITE, BLUE]


def test_bilevel(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert [load_image(tmp_path / "a.png").getpixel((x, 0)) for x in range(2)] == [WHITE, (0, 0, 0)]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 16), BLUE)
    image.paste(RED, (0, 0, 16, 16))  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned 90° clockwise: left becomes top
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    loaded = load_image(tmp_path / "a.jpg")
    assert loaded.size == (16, 32)
    assert loaded.getpixel((8, 4))[0] > 200 and loaded.getpixel((8, 28))[2] > 200


@pytest.mark.parametrize("extension", ["gif", "png", "tiff", "webp"])
def test_the_first_of_several_frames(tmp_path, extension):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if extension == "webp" else {}
    frames[0].save(tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:], **options)
    assert load_image(tmp_path / f"a.{extension}").getpixel((4, 4)) == RED


# --- files that cannot be used


def test_errors_are_user_errors_and_name_the_picture(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png.*does not exist"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    (tmp_path / "notes.png").write_text("hello")
    with pytest.raises(ImageError, match=r"notes\.png.*in none of the formats PNG, JPEG"):
        load_image(tmp_path / "notes.png")
    with pytest.raises(ImageError, match="null"):
        load_image("null\0byte.png")


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "tiff", "webp", "bmp"])
@pytest.mark.parametrize("part", [0.2, 0.9])
def test_truncated_files_are_refused(tmp_path, extension, part):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{extension}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(ImageError, match=r"cannot read image '.*a\."):
        load_image(path)


def test_a_damaged_body_is_refused(tmp_path):
    data = bytearray(png(Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match="damaged"):
        load_image(tmp_path / "a.png")


def test_postscript_is_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n")
    with pytest.raises(ImageError, match="in none of the formats"):
        load_image(tmp_path / "a.png")


def test_the_pixel_limit_is_checked_before_decoding(tmp_path):
    # The file has no pixels at all: were it decoded first, the error would be about damage.
    (tmp_path / "a.png").write_bytes(png_header_only(9_000, 9_000))
    with pytest.raises(ImageError, match=r"9000 × 9000 = 81,000,000 pixels; the limit is 64,000,000"):
        load_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png_header_only(60_000, 60_000))  # Pillow's own limit stops this one
    with pytest.raises(ImageError, match="over the limit of 64,000,000 pixels"):
        load_image(tmp_path / "b.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "c.png")
    assert load_image(tmp_path / "c.png", max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="the limit is 99"):
        load_image(tmp_path / "c.png", max_pixels=99)


def test_a_long_thin_strip_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header_only(1, 1_000_000))
    with pytest.raises(ImageError, match="a side may have 16,384 pixels"):
        load_image(tmp_path / "a.png")


# --- URLs

PICTURE = png(Image.new("RGB", (4, 4), RED))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        route, _, argument = self.path.lstrip("/").partition("?")
        getattr(self, route)(argument)

    def reply(self, body: bytes, status: int = 200, length: bool = True, **headers: str) -> None:
        self.send_response(status)
        if length:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def picture(self, _):
        self.reply(PICTURE)

    def missing(self, _):
        self.reply(b"no", 404)

    def page(self, _):
        self.reply(b"<html>not a picture</html>")

    def to(self, target):
        self.reply(b"", 302, Location=target)

    def loop(self, _):
        self.reply(b"", 302, Location="/loop")

    def declared_large(self, _):
        self.send_response(200)
        self.send_header("Content-Length", str(10**12))
        self.end_headers()

    def endless(self, _):
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.closing.is_set():
                self.wfile.write(bytes(4096))
        except OSError:
            pass

    def packed(self, _):
        self.reply(zlib.compress(PICTURE), Content_Encoding="deflate")

    def slow_body(self, _):
        self.send_response(200)
        self.end_headers()
        self.drip()

    def slow_header(self, _):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
        self.drip()

    def drip(self):
        try:
            while not self.server.closing.wait(0.05):
                self.wfile.write(b"x")
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.closing = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.closing.set()
    server.shutdown()
    server.server_close()


def test_url(server):
    assert load_image(f"{server}/picture").getpixel((0, 0)) == RED


def test_redirects_are_followed_a_few_times(server):
    assert load_image(f"{server}/to?/to?/picture").getpixel((0, 0)) == RED
    with pytest.raises(ImageError, match="redirected more than 5 times"):
        load_image(f"{server}/loop")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a.png", "file:///etc/passwd", "FILE://localhost/etc/passwd"])
def test_only_http_and_https(server, url):
    with pytest.raises(ImageError, match="only http and https"):
        load_image(url)
    with pytest.raises(ImageError, match="only http and https"):
        load_image(f"{server}/to?{url}")


def test_answers_that_are_no_picture(server):
    with pytest.raises(ImageError, match="answered 404"):
        load_image(f"{server}/missing")
    with pytest.raises(ImageError, match="in none of the formats"):
        load_image(f"{server}/page")
    with pytest.raises(ImageError, match="compressed body"):
        load_image(f"{server}/packed")


@pytest.mark.parametrize("route", ["declared_large", "endless"])
def test_byte_limit(server, route):
    with pytest.raises(ImageError, match="larger than the limit of 100,000 bytes"):
        load_image(f"{server}/{route}", max_bytes=100_000)


@pytest.mark.parametrize("route", ["slow_body", "slow_header"])
def test_the_time_out_bounds_the_whole_download(server, route):
    # Both keep sending a byte well within any per-read time-out.
    begin = time.monotonic()
    with pytest.raises(ImageError, match=r"within 0\.5 seconds"):
        load_image(f"{server}/{route}", timeout=0.5)
    assert time.monotonic() - begin < 300  # and not for ever, as they would go on
    assert images.URL_TIMEOUT == 10


def test_unreachable_and_malformed_urls():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound, not listening: a connection is refused
        port = listener.getsockname()[1]
        with pytest.raises(ImageError, match=rf"cannot download 'http://127\.0\.0\.1:{port}/a\.png'"):
            load_image(f"http://127.0.0.1:{port}/a.png")
    for url in ("http://", "http://[::1/a.png", "http://127.0.0.1:99999/a.png"):
        with pytest.raises(ImageError, match="cannot download"):
            load_image(url)
