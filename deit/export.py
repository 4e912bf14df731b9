"""A trained network for other programs, under the name that users import; see `deit.weights`."""

from deit.weights.export import load_package, to_aoti, to_onnx, to_program, to_safetensors

__all__ = ["load_package", "to_aoti", "to_onnx", "to_program", "to_safetensors"]
