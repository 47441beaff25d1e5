"""Slide readers behind one protocol."""
