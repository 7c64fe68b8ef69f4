"""Writes tests/golden/int4/compressed_tensors.npz: a weight as compressed-tensors packs it.

Run from the root of the repository with the extra `golden` installed:

    python tools/make_int4_golden.py

The library packs and unpacks; scales are this project's, since the library's own rule, absmax / 7.5
with codes from -8, is not the one of K2's checkpoints.
"""

import datetime
import json
import pathlib

import compressed_tensors
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import helpers
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

OUT = pathlib.Path("tests/golden/int4/compressed_tensors.npz")
SEED = 20251106
OUTPUTS, INPUTS, GROUP = 24, 96, 32


def main() -> None:
    """Writes the file."""
    generator = torch.Generator().manual_seed(SEED)
    weight = (0.02 * torch.randn(OUTPUTS, INPUTS, generator=generator)).bfloat16()
    largest = weight.float().reshape(OUTPUTS, INPUTS // GROUP, GROUP).abs().amax(-1)
    scale = (largest / 7).clamp(min=1e-5).bfloat16()
    arguments = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)
    zero = torch.zeros_like(scale)
    codes = quantize(weight.float(), scale.float(), zero, arguments, dtype=torch.int8)
    packed = helpers.pack_to_int32(codes, 4)
    restored = helpers.unpack_from_int32(packed, 4, weight.shape)
    assert torch.equal(restored, codes)
    values = dequantize(restored, scale, zero, arguments)
    provenance = {
        "written by": "tools/make_int4_golden.py",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "compressed-tensors": compressed_tensors.__version__,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        OUT,
        weight=weight.float().numpy(),
        weight_packed=packed.numpy(),
        weight_scale=scale.float().numpy(),
        values=values.float().numpy(),
        provenance=json.dumps(provenance),
    )
    print(f"wrote {OUT}: {values.dtype} values, {packed.shape} words")


if __name__ == "__main__":
    main()
