"""The public door: it stands in front of Cog's server, and decides who comes in and what is asked of whom."""
