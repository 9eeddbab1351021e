"""PaliGemma's tokenizer, fetched once into openpi's cache."""

import hashlib
from pathlib import Path

import fsspec

from openpi_ar.errors import UserError
from openpi_ar.files import check_directory, writing
from openpi_ar.text.tokenizer import PALIGEMMA_MIRROR, PALIGEMMA_URL, paligemma_paths

SHA256 = "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6"
"""Of the 4,264,023 bytes that openpi, big_vision and PaliGemma's repositories on the hub have."""

_ANOTHER = "set OPENPI_DATA_HOME to a directory that can be written"


def fetch_paligemma(source: str = PALIGEMMA_MIRROR) -> tuple[Path, bool]:
    """(where the tokenizer is in the cache, whether it was fetched now).

    `source`: its address, or a file. Raises UserError if it cannot be read, is another file, or cannot be written.
    """
    target = paligemma_paths()[0]
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == SHA256:
        return target, False
    check_directory(target.parent, _ANOTHER)
    by_hand = f"or download {PALIGEMMA_URL} or {PALIGEMMA_MIRROR} elsewhere and copy it to {target}"
    try:
        # Public buckets are read without credentials.
        with fsspec.open(source, "rb", **({"token": "anon"} if source.startswith("gs://") else {})) as file:
            content = file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as e:
        raise UserError(f"{source} needs one more package ({e}): pip install 'openpi-ar[remote]', {by_hand}") from e
    except Exception as e:  # every backend has its own errors
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{source} cannot be read: {reason}; try again with a network, {by_hand}") from e
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise UserError(
            f"{source} is not PaliGemma's tokenizer: {len(content)} bytes of SHA-256 {found}, expected {SHA256}; give "
            f"another --source, {by_hand}"
        )
    with writing(target, _ANOTHER):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.partial")
        beside.write_bytes(content)
        beside.replace(target)
    return target, True
