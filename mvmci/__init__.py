"""mvmci: durable WebAssembly CI on hosts you own, in one file."""

__version__ = "0.2.0"
