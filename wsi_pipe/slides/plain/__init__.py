"""Plain pictures, and TIFFs that only a general reader understands."""
