"""Who may use the server: API keys, their limits, and the answer to those who may not."""
