"""ElevenLabs' text-to-speech API: HTTP routes, and WebSockets with incremental text."""
