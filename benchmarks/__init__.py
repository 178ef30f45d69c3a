"""Measures mvmci beside what a user would pick instead, in one run: `./just bench`."""
