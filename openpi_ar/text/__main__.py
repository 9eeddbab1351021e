"""`python -m openpi_ar.text fetch paligemma`: the tokenizer of full-size models, once, into openpi's cache."""

from typing import Annotated, Literal

import tyro

from openpi_ar import flags
from openpi_ar.errors import command_line
from openpi_ar.text.tokenizer import PALIGEMMA_MIRROR


def fetch(name: Annotated[Literal["paligemma"], tyro.conf.Positional], *, source: str = PALIGEMMA_MIRROR) -> None:
    """Fetch a tokenizer into the cache, and check that it is the right one.

    Args:
        name: which one.
        source: address (https://, gs://) or file to read it from.
    """
    from openpi_ar.text.fetch import fetch_paligemma

    path, fetched = fetch_paligemma(source)
    print(f"{path}: {'fetched from ' + source if fetched else 'is there already'}; --text.tokenizer {name} finds it")


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        flags.parse({"fetch": fetch}, argv, "python -m openpi_ar.text")()


if __name__ == "__main__":
    main()
