"""Plain, slow, obvious implementations in the papers' symbols: the tests' oracles."""
