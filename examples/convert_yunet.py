"""The weights of YuNet as its authors publish them -> weights/face_detector.pth.

    python -m examples.convert_yunet face_detection_yunet_2023mar.onnx

Needs ONNX: pip install onnx.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from checkpoints import replace_file
from faces.detector import WEIGHTS, YuNet


def convert(path: str) -> dict[str, torch.Tensor]:
    """The state_dict of YuNet from the .onnx file of https://github.com/opencv/opencv_zoo (2023mar)."""
    import onnx

    graph = onnx.load(path).graph
    tensors = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    convs = [(tensors[node.input[1]], tensors[node.input[2]]) for node in graph.node if node.op_type == "Conv"]
    model = YuNet()
    first, *rest = (
        layer
        for part in (model.features, *reversed(model.lateral))
        for layer in part.modules()
        if isinstance(layer, nn.Conv2d)
    )
    convs[0] = convs[0][0].flip(1), convs[0][1]  # it takes BGR
    for layer, (weight, bias) in zip([first, *rest], convs, strict=False):
        layer.weight.data, layer.bias.data = weight, bias
    heads = convs[1 + len(rest) :]  # of faces, boxes, objects, landmarks; each for three strides, of two layers
    for stride, head in enumerate(model.heads):
        for depth, layer in enumerate(head):
            parts = [heads[6 * kind + 2 * stride + depth] for kind in (0, 2, 1, 3)]
            layer.weight.data, layer.bias.data = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return model.state_dict()


def write(weights: dict[str, torch.Tensor], target: Path) -> None:
    with target.open("wb") as file:  # given a path, torch.save would write its name into the file
        torch.save(weights, file)


if __name__ == "__main__":
    weights = convert(sys.argv[1])
    replace_file(WEIGHTS, lambda target: write(weights, target))
    print(f"{sum(tensor.numel() for tensor in weights.values()):,} parameters written to {WEIGHTS}")
