"""Is there what a run needs? Facts about machines, and what they come to; `cluster.preflight` gathers them."""
