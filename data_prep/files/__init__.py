"""Files as they were published: near or far, in tars, pickles and archives of arrays; nothing in them is trusted."""
