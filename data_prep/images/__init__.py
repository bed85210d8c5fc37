"""From hostile bytes to pixels: pieces of a source, decoding, crops, and what cannot be used."""
