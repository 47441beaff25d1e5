"""Decoding one native tile, at a reduced scale where the codec has one."""
