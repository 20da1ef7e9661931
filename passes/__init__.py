"""Graph passes: the contract, the rewrite engine, rule families, and the one place that orders them."""
