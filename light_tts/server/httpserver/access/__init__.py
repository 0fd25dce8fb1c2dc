"""Access control: API keys, their limits, and the error responses for requests without access."""
