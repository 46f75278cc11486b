"""What a run will need, which node may host what, and (preflight) whether it is there."""
