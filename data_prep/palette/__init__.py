"""From images to a palette: colours counted in parts, then one fit."""
