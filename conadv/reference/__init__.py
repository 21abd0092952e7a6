"""Plain, slow, obvious implementations in the papers' symbols: the oracles of the tests, and how to read a method."""
