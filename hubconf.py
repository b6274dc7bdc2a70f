"""For torch.hub: model = torch.hub.load("path/to/this/folder", "emotion_model", source="local")"""

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]


def emotion_model(checkpoint: str | None = None, device: str = "auto"):
    """The model of a checkpoint (by default the bundled one), ready for predict_emotion.predict_image.

    It takes normalized float32 images (N, C, H, W) and returns logits; its `info` has the class_names, input_spec and
    temperature.
    """
    from inference import BUNDLED, load_model

    model, _ = load_model(BUNDLED if checkpoint is None else checkpoint, device)
    return model
