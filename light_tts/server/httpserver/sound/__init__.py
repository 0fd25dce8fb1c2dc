"""Audio processing between the stages and the client: tempo, pauses, sample rate and fades (`shape`), and the
output format (`encoders`). `SoundOut` combines them for one response."""

from light_tts.server.httpserver.sound.encoders import FORMATS, Format, content_type
from light_tts.server.httpserver.sound.out import SoundOut, SoundWishes

__all__ = ["FORMATS", "Format", "SoundOut", "SoundWishes", "content_type"]
