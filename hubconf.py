"""For torch.hub: model = torch.hub.load("path/to/this/folder", "emotion_model", source="local")"""

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]


def emotion_model(checkpoint: str | None = None, device: str = "auto"):
    """The network of a checkpoint (by default the one that comes along), ready for predict_emotion.predict_image.

    It carries `class_names`, `input_spec` and `temperature`, eats normalised float32 (N, C, H, W), returns logits.
    """
    from predict_emotion import BUNDLED, load_model

    model, _ = load_model(BUNDLED if checkpoint is None else checkpoint, device)
    return model
