"""Writes tests/golden/optimizer/*.npz: eight steps of torch.optim.Muon and AdamW.

Run from the root of the repository with the extra `golden` installed:

    python tools/make_optimizer_golden.py

Each file holds initial weights, the gradients that were fed in, the weights after every step, the
options, and its provenance. torch's Muon runs Newton-Schulz in bfloat16; the files named float32
come from the same class with `Tensor.bfloat16` replaced by a copy in float32, so that a comparison
can be tight.
"""

import contextlib
import datetime
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

OUT = pathlib.Path("tests/golden/optimizer")
SEED = 20250728
STEPS = 8
SHAPES = {"tall": (24, 16), "wide": (16, 40), "square": (20, 20)}


@contextlib.contextmanager
def float32_newton_schulz() -> Iterator[None]:
    """Lets torch's Newton-Schulz iteration run in float32."""
    original = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda tensor: tensor.float().clone()
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = original


def trajectory(make_optimizer: Callable[[list], torch.optim.Optimizer]) -> dict[str, np.ndarray]:
    """Runs an optimizer on random weights and gradients, and records both."""
    generator = torch.Generator().manual_seed(SEED)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    record = {f"initial/{name}": weight.numpy().copy() for name, weight in weights.items()}
    gradients = {
        name: torch.randn((STEPS, *shape), generator=generator) for name, shape in SHAPES.items()
    }
    record |= {f"gradients/{name}": gradient.numpy() for name, gradient in gradients.items()}
    parameters = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    optimizer = make_optimizer(list(parameters.values()))
    after = {name: [] for name in SHAPES}
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            after[name].append(parameter.detach().numpy().copy())
    return record | {f"weights/{name}": np.stack(values) for name, values in after.items()}


def write(name: str, options: dict, record: dict[str, np.ndarray]) -> None:
    """Writes one file with its provenance."""
    provenance = {
        "torch": torch.__version__,
        "command": "python tools/make_optimizer_golden.py",
        "date": datetime.date.today().isoformat(),
        "seed": SEED,
    }
    path = OUT / f"{name}.npz"
    np.savez_compressed(
        path, **record, options=json.dumps(options), provenance=json.dumps(provenance)
    )
    print(f"{path}: {path.stat().st_size:,} bytes, {json.dumps(provenance)}")


def main() -> None:
    """Writes every file."""
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    for nesterov in (True, False):
        options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov}

        def muon(parameters, options=options):
            return torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **options)

        name = "muon_nesterov" if nesterov else "muon_heavy_ball"
        write(f"{name}_bfloat16", options, trajectory(muon))
        with float32_newton_schulz():
            write(f"{name}_float32", options, trajectory(muon))
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    write("adamw", options, trajectory(lambda p: torch.optim.AdamW(p, **options)))


if __name__ == "__main__":
    main()
