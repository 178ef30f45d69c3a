"""The topologies that ship: a plan function each, with its YAML file beside it."""
