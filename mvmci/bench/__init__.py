"""What a cluster can carry, what bounds it, and so which access to use: `mvmci bench` (docs/bench.md)."""
