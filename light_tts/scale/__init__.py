"""Runs several servers behind one address."""
