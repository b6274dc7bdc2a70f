"""Quantization: an ONNX file in 8-bit integers, made from the float32 one, and what that costs in accuracy."""

import logging
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from data import FolderImages
from errors import InputError, reason_of
from export.formats import INFO_NAME, images_at, read_exported

INT8_NAME = "emotion_model.int8.onnx"
CALIBRATION_IMAGES = 512
OPERATORS = ["Conv", "Gemm", "MatMul", "Add", "Mul", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool"]


def quantize(source: Path, target: Path, images: torch.Tensor) -> None:
    """Static quantization of the ONNX file `source` to 8 bits by onnxruntime, with weights per channel.

    The ranges of the activations are those on `images`, uint8 (N, C, S, S). Raises InputError if it fails.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        batches = iter(images.split(64))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    logging.disable(logging.WARNING)
    try:
        prepared = target.with_suffix(".prepared")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(target),
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,  # signed ones take over twice as long as float32 on x86
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=OPERATORS,
        )
        text = {prop.key: prop.value for prop in onnx.load(str(source)).metadata_props}[INFO_NAME]
        program = onnx.load(str(target))
        onnx.helper.set_model_props(program, {INFO_NAME: text})
        onnx.save(program, str(target))
    except Exception as error:  # onnxruntime raises anything
        raise InputError(f"{target.name} can't be written: {reason_of(error)}") from None
    finally:
        logging.disable(logging.NOTSET)


def measure(path: Path, data: FolderImages) -> tuple[float, float]:
    """Accuracy of an ONNX file on `data` as a fraction, and the milliseconds of one image at a time (the median)."""
    model, _ = read_exported(path, trust=True)
    correct, times = 0, []
    for rows in np.array_split(np.arange(len(data)), -(-len(data) // 256)):
        correct += (model.probs(images_at(data, rows)).argmax(1).numpy() == data.labels[rows]).sum()
    for number in range(60):
        image = images_at(data, np.array([number % len(data)]))
        start = time.perf_counter()
        model.probs(image)
        times.append(time.perf_counter() - start)
    return float(correct / len(data)), 1000 * statistics.median(times[10:])  # the first ones warm up
