"""The accesses that ship with mvmci, one commented file each."""
