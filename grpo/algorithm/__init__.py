"""What a completion is compared with and what the policy learns from it: pure functions, a variant is one of them."""
