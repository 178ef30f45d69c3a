"""The ways in to an engine: `embedded` is a call. Their contract is `mvmci.engine`."""
