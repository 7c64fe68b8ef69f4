"""A model as values under the published names, to be inspected beside others."""

import types
from collections.abc import Mapping

import numpy as np

from kimi_jax.interop.hf_names import hf_tensors
from kimi_jax.interop.safetensors_header import TensorInfo
from kimi_jax.interop.tensor_source import TensorSource


class DequantizedTensors:
    """The published tensors of a model, whatever it is stored in: values in float32."""

    def __init__(self, source: TensorSource) -> None:
        """Wraps a source; nothing is read."""
        self._source = source
        shapes = {name: tensor.shape for name, tensor in hf_tensors(source.config).items()}
        infos = {name: TensorInfo(name, "F32", shape) for name, shape in shapes.items()}
        self.tensors: Mapping[str, TensorInfo] = types.MappingProxyType(infos)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns rows of the first dimension of a tensor."""
        rows = rows or slice(0, self.tensors[name].shape[0])
        return self._source.rows(name, rows).astype(np.float32)
