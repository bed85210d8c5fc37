"""From hostile bytes to pixels: pieces of a source, and what cannot be used."""
