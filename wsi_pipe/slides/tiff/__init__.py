"""TIFF slides: the reader, its directories and layout, and what vendors write into them."""
