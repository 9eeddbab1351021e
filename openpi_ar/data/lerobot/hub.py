"""A dataset by its name on the Hugging Face hub: downloaded once, then read from the hub library's cache."""

from pathlib import Path
import re

from openpi_ar.errors import UserError, first_line

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def local_dataset(path: str | Path) -> Path:
    """The directory itself, or that of `owner/name` or `owner/name@revision` after downloading what is not cached.

    Raises UserError if it is neither, the hub's library is not installed, or the download fails.
    """
    try:
        root = Path(path).expanduser()
    except RuntimeError as e:  # "~name" of a user whom the system does not know
        raise UserError(f"{path}: {e}") from e
    if root.is_dir() or not _NAME.fullmatch(str(path)):
        return root
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(
            f"{path} is not a directory; to read it as a dataset of the Hugging Face hub, install the extra: pip "
            f"install openpi-ar[remote]"
        ) from e
    name, _, revision = str(path).partition("@")
    try:
        # Shows its own progress. Files that are there already are not fetched again; without a network, they are used.
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision or None))
    except Exception as e:  # the library's, its HTTP client's and the network's errors share no base class
        raise UserError(
            f"{path} is neither a directory nor a dataset that the Hugging Face hub gives: {first_line(e)}; check the "
            f"name and the network, or copy the dataset here"
        ) from e
