"""Hosts over ssh: who they are, what they have, and what is done on them."""
