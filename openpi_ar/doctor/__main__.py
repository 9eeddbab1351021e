"""Checks a checkpoint's numbers.

python -m openpi_ar.doctor verify my_policy goldens/pi05
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from openpi_ar import files, flags
from openpi_ar.errors import command_line
from openpi_ar.tables import console, new_table


def verify(
    path: Annotated[str, tyro.conf.Positional],
    golden: Annotated[Path, tyro.conf.Positional],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    siglip_heads: int | None = None,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Run a golden's inputs through a checkpoint and compare; exit code 1 if a quantity is out of its bound.

    Args:
        path: directory, file, address or hub id of the checkpoint.
        golden: directory of arrays that reference code computed with the same weights.
        dtype: of the computation.
        siglip_heads: where neither the checkpoint nor the golden tells it; found by trying if not given.
        json_path: write the table there too.
    """
    files.check_file(json_path, "--json")
    from openpi_ar.doctor.verify import verify as compare

    differences, notes = compare(path, golden, compute_dtype=dtype, siglip_heads=siglip_heads)
    out, table = console(), new_table("quantity", "max abs difference", "mean", "bound", "")
    for d in differences:
        bound = f"{d.bound:.0e}" + (" on the mean" if d.judged == "mean" else "")
        table.add_row(d.name, f"{d.largest:.2e}", f"{d.mean:.2e}", bound, "ok" if d.ok else "FAILED")
    out.print(table)
    for note in notes:
        out.print(f"note: {note}", highlight=False, soft_wrap=True)
    failed = [d.name for d in differences if not d.ok]
    body = {d.name: {"max": d.largest, "mean": d.mean, "bound": d.bound, "ok": d.ok} for d in differences}
    files.write_json(json_path, {"ok": not failed, "quantities": body})
    verdict = f"verified: all {len(differences)} quantities agree"
    if failed:
        verdict = f"FAILED: {len(failed)} of {len(differences)} quantities differ: {', '.join(failed)}"
    out.print(verdict, highlight=False, soft_wrap=True)
    if failed:
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        flags.parse({"verify": verify}, argv, "python -m openpi_ar.doctor")()


if __name__ == "__main__":
    main()
