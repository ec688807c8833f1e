"""The public door: it stands before Cog's server, and speaks to people and platforms."""
