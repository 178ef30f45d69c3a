"""Inside and around one slot process: how untrusted code runs here, and what it can reach.

`forkserver` forks slots, `confinement` shuts them in, `slot` runs a guest in one, `frames` is what
crosses the socket between a slot and its parent, `code` keeps compiled modules. On the parent's
side, `http` and `exec` perform the effects that a workflow asks for, and `workspace` turns
directories into trees of blobs and back.
"""
