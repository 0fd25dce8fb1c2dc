"""The surface of ElevenLabs' text-to-speech API: HTTP, and WebSockets on which text comes bit by bit."""
