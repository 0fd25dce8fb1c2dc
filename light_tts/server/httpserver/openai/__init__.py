"""OpenAI's speech API, with the extensions of vLLM-Omni's server."""
