"""Texts and recordings to token ids and features."""
