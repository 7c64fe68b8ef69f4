"""What kernels for TPUs know of the chips."""

from typing import NamedTuple

LANES = 128  # columns of a vector
BFLOAT16_ROWS = 16  # of a vector


class Chip(NamedTuple):
    """One chip.

    Attributes:
      vmem_mib: VMEM of a core that a kernel may use; the compiler wants some for itself.
      matrix_unit: rows and columns of a multiplication unit.
      bfloat16_vectors: whether vector units compute in bfloat16, twice as many values at a time as
        in float32. Elsewhere each bfloat16 operation costs conversions.
    """

    vmem_mib: int
    matrix_unit: int
    bfloat16_vectors: bool

    @property
    def vmem_bytes(self) -> int:
        """`vmem_mib` in bytes."""
        return self.vmem_mib * 2**20


_CHIPS = {
    "v5e": Chip(vmem_mib=100, matrix_unit=128, bfloat16_vectors=False),  # of 128 MiB
    "v5p": Chip(vmem_mib=58, matrix_unit=128, bfloat16_vectors=False),  # of 64
    "v6e": Chip(vmem_mib=100, matrix_unit=256, bfloat16_vectors=True),  # of 128
    "tpu7x": Chip(vmem_mib=56, matrix_unit=256, bfloat16_vectors=True),  # of 64
}
_ANY = Chip(vmem_mib=56, matrix_unit=128, bfloat16_vectors=False)


def facts(chip: str | None) -> Chip:
    """Returns what is known of a chip by its name in `core.platform`.

    For any other one, and for a CPU, which interprets kernels, the least is assumed.
    """
    return _CHIPS.get(chip or "", _ANY)


def up_to_multiple(size: int, multiple: int) -> int:
    """Returns the next multiple."""
    return size + -size % multiple
