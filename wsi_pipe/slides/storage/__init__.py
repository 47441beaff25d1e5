"""Where the bytes come from: local files, byte ranges of URLs, copies."""
