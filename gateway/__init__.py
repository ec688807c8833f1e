"""The public door in front of Cog's server: runs it on loopback, watches it, and speaks for it."""
