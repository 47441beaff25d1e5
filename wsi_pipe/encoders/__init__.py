"""Encoders: uint8 tiles in, features out."""
