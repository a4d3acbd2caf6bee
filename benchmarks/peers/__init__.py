"""One reproducible benchmark: the same pairs through this trainer and through its peers, in alternating processes."""
