"""What happens to the samples of a speech between the stages and the client: tempo, pauses, sample rate,
fades (`shape`), and the format (`encoders`). `SoundOut` is all of it for one answer."""

from light_tts.server.httpserver.sound.encoders import FORMATS, Format, content_type
from light_tts.server.httpserver.sound.out import SoundOut, SoundWishes

__all__ = ["FORMATS", "Format", "SoundOut", "SoundWishes", "content_type"]
