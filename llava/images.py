"""Pictures from a path or a URL, made safe and turned into 8-bit RGB.

Everything that opens a picture a user named goes through `load_image`, so that a broken file, a decompression
bomb, a slow server or a redirect to `file://` is the same clear `ImageError` everywhere.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import threading
import time
import warnings
from pathlib import Path

import httpx
import numpy as np
from PIL import Image, ImageOps

from llava.utils import UserError

#: Pictures with more pixels than this are refused from their header, before anything is decoded.
MAX_PIXELS = 64_000_000
#: Longest side in pixels. LLaVA pads to a square, so a 1 × 60,000,000 strip would ask for petabytes.
MAX_SIDE = 16_384
#: Largest download in bytes.
MAX_BYTES = 32 * 2**20
#: Seconds that a whole download may take: name look-up, redirects and body together.
URL_TIMEOUT = 10.0
MAX_REDIRECTS = 5

# Formats that Pillow decodes itself. EPS (which starts Ghostscript), PDF and the like stay out.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class ImageError(UserError):
    """A picture that cannot be used. The message names the picture and says what to do."""


def is_url(source: str | Path) -> bool:
    """Whether `source` is written as a URL (of any scheme), not as a path."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def load_image(
    source: str | Path,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    timeout: float = URL_TIMEOUT,
    only_public: bool = False,
) -> Image.Image:
    """Open a picture and return it upright, opaque and in 8-bit RGB.

    Turned as its EXIF data says; transparency laid on white; 16-bit grey scaled to 8 bits (32-bit samples,
    which declare no range, are stretched over the values found); CMYK and palettes converted; the first of
    several frames.

    Args:
        source: a path, or an `http`/`https` URL.
        max_pixels: limit on width × height, checked before decoding. Longer sides than `MAX_SIDE` are
            refused as well.
        max_bytes: limit on a download, in bytes.
        timeout: seconds for a whole download.
        only_public: whether to download from public addresses alone, at every redirect: for sources that a stranger
            names, who must not reach this machine's network through it.

    Returns:
        A `PIL.Image.Image` of mode `RGB`.

    Raises:
        ImageError: missing, unreadable, truncated, too large, of another format, or not to be downloaded.
    """
    name = str(source)
    if is_url(source):
        return decode_image(_download(name, max_bytes, timeout, only_public), name, max_pixels=max_pixels)
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            raise ImageError(f"image {name!r} is a folder, not a picture")
        if not path.is_file():
            raise ImageError(f"image {name!r} does not exist (looked in {Path.cwd()})")
        with path.open("rb") as file:
            return _decode(file, name, max_pixels)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot read image {name!r}: {error}") from error


def decode_image(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load_image` for a file's content; errors call it `name`."""
    return _decode(io.BytesIO(content), name, max_pixels)


def _decode(file, name: str, max_pixels: int) -> Image.Image:
    Image.init()
    formats = [each for each in FORMATS if each in Image.OPEN]
    try:
        with warnings.catch_warnings():  # over the limit is an error of ours, not a warning of Pillow's
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"cannot read image {name!r}: damaged, or in none of the formats {', '.join(formats)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name!r} is over the limit of {max_pixels:,} pixels; make it smaller") from error
    except Exception as error:  # decoders fail in many ways on damaged headers
        raise ImageError(f"cannot read image {name!r}: {error}") from error

    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"image {name!r} has {width} × {height} = {width * height:,} pixels; the limit is "
            f"{max_pixels:,}: make it smaller"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"image {name!r} is {width} × {height}; a side may have {MAX_SIDE:,} pixels: make it smaller")
    try:
        image.load()
        return _to_rgb(_upright(image), image.format)
    except Exception as error:  # the same for damaged bodies: truncated, bad checksum, unknown colour space, …
        raise ImageError(f"cannot read image {name!r}: {error} (damaged or incomplete file?)") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that cannot be parsed says nothing about the rotation; the pixels are fine
        return image


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _grey_to_8_bit(image, file_format).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image, file_format: str | None) -> Image.Image:
    # Pillow's own convert() clips these modes at 255. Older versions open 16-bit PNG and PPM as mode "I".
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16") or file_format in ("PNG", "PPM"):
        low, high = 0.0, 65535.0
    else:
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255.0 / ((high - low) or 1.0))
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))


def _download(url: str, max_bytes: int, timeout: float, only_public: bool) -> bytes:
    # In a thread, because no per-read time-out bounds a server that sends a byte now and then: when the time
    # is up the caller goes on and the connection is closed under the thread.
    _check_scheme(url, url)
    outcome: list[bytes | Exception] = []
    client = httpx.Client(
        timeout=timeout,
        headers={"Accept-Encoding": "identity", "User-Agent": "llava-visipruner"},
        transport=_PublicTransport() if only_public else None,
    )

    def work() -> None:
        try:
            outcome.append(_fetch(client, url, max_bytes, time.monotonic() + timeout))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="image download", daemon=True)
    thread.start()
    try:
        thread.join(timeout)
    finally:
        client.close()
    result = outcome[0] if outcome else httpx.TimeoutException("")
    if isinstance(result, bytes):
        return result
    if isinstance(result, ImageError):
        raise result
    if isinstance(result, httpx.TimeoutException):
        raise ImageError(f"no picture from {url!r} within {timeout:g} seconds") from result
    raise ImageError(f"cannot download {url!r}: {str(result) or type(result).__name__}") from result


class _PublicTransport(httpx.HTTPTransport):
    """Connects to public addresses alone, through no proxy. A name is looked up once and that address is used, so that
    it cannot mean another one a moment later."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"the name {host!r} is not known") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not all(map(_is_public, addresses)):
            raise ImageError(f"cannot download from {host!r}: only public addresses are allowed")
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=addresses[0]),
            headers=request.headers,  # whose Host is the name
            extensions={**request.extensions, "sni_hostname": host},  # what the certificate has to name
        )
        return super().handle_request(pinned)


# Addresses that stand for IPv4 ones: translated, tunnelled.
_CARRIERS = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _CARRIERS if net.version == ip.version)


def _fetch(client: httpx.Client, url: str, max_bytes: int, deadline: float) -> bytes:
    request = client.build_request("GET", url)
    for _ in range(MAX_REDIRECTS + 1):
        response = client.send(request, stream=True)
        try:
            if response.next_request is None:
                return _body(response, url, max_bytes, deadline)
            request = response.next_request
        finally:
            response.close()
        _check_scheme(str(request.url), url)
    raise ImageError(f"{url!r} was redirected more than {MAX_REDIRECTS} times")


def _body(response: httpx.Response, url: str, max_bytes: int, deadline: float) -> bytes:
    if response.status_code != httpx.codes.OK:
        raise ImageError(f"{url!r} answered {response.status_code} {response.reason_phrase}".rstrip())
    if response.headers.get("Content-Encoding", "identity") != "identity":
        # Not asked for, and a compressed body could grow without bound while it is unpacked.
        raise ImageError(f"{url!r} sent a compressed body; download the picture and pass its path")
    too_large = ImageError(f"{url!r} is larger than the limit of {max_bytes:,} bytes")
    declared = response.headers.get("Content-Length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("")
    return bytes(body)


def _check_scheme(target: str, url: str) -> None:
    match = _SCHEME.match(target)
    if match is None or match[1].lower() not in ("http", "https"):
        via = "" if target == url else f" (redirected to {target!r})"
        raise ImageError(f"cannot download {url!r}{via}: only http and https URLs are allowed")
