"""How the codes of a row are packed into words: what kernels store of behaviours for backward."""

from typing import NamedTuple

import torch

from hashtab.kernels.core import dispatch

_FEW = 200  # latest behaviours for each walk, of which masks are sooner done than a walk


class Packing(NamedTuple):
    """How the codes of a row lie in its int32 words, the first code in the lowest bits.

    Attributes:
        tau: bits of a code.
        groups: codes of a row.
    """

    tau: int
    groups: int

    @property
    def bits(self) -> int:
        """Bits that a code takes: tau rounded up to a power of two, so that none is cut apart."""
        return _power_of_two(self.tau)

    @property
    def padded_groups(self) -> int:
        """Groups rounded up to a power of two."""
        return _power_of_two(self.groups)

    @property
    def padded_rows(self) -> int:
        """Rows of a user's table of padded groups."""
        return self.padded_groups << self.tau

    @property
    def columns(self) -> int:
        """Products of a row with the planes, those with none included."""
        return self.padded_groups * self.bits

    @property
    def words(self) -> int:
        """Words of a row, a power of two."""
        return max(1, self.columns // 32)

    def why_no_walk(self, rows: torch.Tensor, last: int | None) -> str | None:
        """Return why walks over histories are not for such behaviours, or None if they are.

        Their products are of bfloat16, which Triton's interpreter cannot multiply, and of 16 groups
        at least; a program holds `walk_rows` of a table in registers, which on older GPUs spill, as
        do many groups of wide rows, and with more than four walks masks are as fast (for 320
        queries a user of 2,048 behaviours with four already).
        """
        table, at_once = self.padded_rows, walk_rows(rows.shape[1])
        few = _FEW * -(-table // at_once)
        if rows.dtype != torch.bfloat16:
            return f"they are for bfloat16, not {rows.dtype}"
        if self.padded_groups < 16:
            return f"they are for 9 groups and more, got {self.groups}"
        if rows.shape[1] > 128 and self.padded_groups > 16:
            return f"they are for up to 16 groups of D beyond 128, got {self.groups}"
        if table > 4 * at_once:
            return f"they are for tables of up to {4 * at_once} rows, got {table}"
        if last is not None and last < few:
            return f"they take out what is beyond the latest {few} behaviours and more, got {last=}"
        if rows.device.type == "cpu" or dispatch.before_hopper(rows):
            return "they are for GPUs from compute capability 9.0"
        return None


def walk_rows(size: int) -> int:
    """Return how many rows `[size]` of a table a walk holds."""
    return 128 if size <= 128 else 64


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
