"""WS /v1/realtime: the events of OpenAI's Realtime API, with text input and speech output."""
