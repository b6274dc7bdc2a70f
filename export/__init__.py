"""What export_emotion.py does: file formats and quantization."""
