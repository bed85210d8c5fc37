"""From images to the token shards that igpt_ds trains on; the command is igpt-data."""
