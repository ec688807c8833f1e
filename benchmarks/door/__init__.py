"""What a gateway before Cog's server costs: the parts of benchmarks/gateway.py."""
