"""Converts texts and recordings to token ids and features."""
