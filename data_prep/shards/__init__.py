"""From images to token shards: the plan, one slice, all of them."""
