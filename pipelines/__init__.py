"""End-to-end experiments over wsi_pipe and lrmil; neither imports them."""
