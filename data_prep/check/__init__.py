"""A dataset looked at again: every byte verified, or a sample told and drawn."""
