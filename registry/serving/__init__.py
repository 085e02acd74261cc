"""HTTP sampling: a bounded queue, batches across clients, and the version that an alias points to."""
