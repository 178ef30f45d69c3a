"""The places where jobs are kept: `memory` (also in a folder) and `nats`. Their contract is `mvmci.store`."""
