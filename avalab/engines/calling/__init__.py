"""Function calls decoded fast: what the grammar dictates is appended, what the prompt says is guessed and verified."""
