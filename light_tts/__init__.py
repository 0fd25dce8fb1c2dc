"""Light-TTS: a multi-process text-to-speech server for CosyVoice-format checkpoints."""

__version__ = "0.1.0"
